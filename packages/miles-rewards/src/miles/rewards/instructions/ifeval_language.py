"""IFEval (arXiv:2311.07911): language and letter case."""

from __future__ import annotations

from miles.rewards.instructions.check import Check, compare
from miles.rewards.instructions.text import tokens


def response_language(response: str, *, language: str) -> bool:
    """The response is in the language, an ISO 639-1 code."""
    return _detected(response) in (None, language)


def english_capital(response: str) -> bool:
    """English in capital letters."""
    return response.isupper() and _detected(response) in (None, "en")


def english_lowercase(response: str) -> bool:
    """English in small letters."""
    return response.islower() and _detected(response) in (None, "en")


def capital_word_frequency(response: str, *, capital_frequency: float, capital_relation: str) -> bool:
    """Less than, or at least, so many words in capital letters."""
    return compare(sum(1 for word in tokens(response) if word.isupper()), capital_relation, capital_frequency)


def _detected(text: str) -> str | None:
    """The language, the same for the same text; None when the text has no sign of one."""
    import langdetect  # reads its profiles, in workers only

    langdetect.DetectorFactory.seed = 0
    try:
        return str(langdetect.detect(text))
    except langdetect.LangDetectException:
        return None


CHECKS: dict[str, Check] = {
    "language:response_language": response_language,
    "change_case:english_capital": english_capital,
    "change_case:english_lowercase": english_lowercase,
    "change_case:capital_word_frequency": capital_word_frequency,
}
