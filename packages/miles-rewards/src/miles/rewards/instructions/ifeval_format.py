"""IFEval (arXiv:2311.07911): marks, parts, beginnings and ends."""

from __future__ import annotations

import json
import re

from miles.rewards.instructions.check import Check

_STAR_BULLET = re.compile(r"^\s*\*[^*].*$", re.MULTILINE)
_DASH_BULLET = re.compile(r"^\s*-.*$", re.MULTILINE)
_ANSWERS = ("My answer is yes.", "My answer is no.", "My answer is maybe.")
_HIGHLIGHT = re.compile(r"\*[^\n*]*\*")
_DOUBLE_HIGHLIGHT = re.compile(r"\*\*[^\n*]*\*\*")
_TITLE = re.compile(r"<<[^\n]+>>")
_FENCE = re.compile(r"\A```(?:json|Json|JSON)?")


def number_bullet_lists(response: str, *, num_bullets: float) -> bool:
    """Exactly so many bullets."""
    return len(_STAR_BULLET.findall(response)) + len(_DASH_BULLET.findall(response)) == num_bullets


def constrained_response(response: str) -> bool:
    """One of the three answers."""
    return any(answer in response for answer in _ANSWERS)


def number_highlighted_sections(response: str, *, num_highlights: float) -> bool:
    """At least so many ``*highlighted*`` parts."""
    single = sum(1 for part in _HIGHLIGHT.findall(response) if part.strip("*").strip())
    double = sum(1 for part in _DOUBLE_HIGHLIGHT.findall(response) if part[2:-2].strip())
    return single + double >= num_highlights


def multiple_sections(response: str, *, section_spliter: str, num_sections: float) -> bool:
    """At least so many parts that begin like ``SECTION 1``."""
    heading = re.compile(rf"\s?{re.escape(section_spliter.strip())}\s?\d+\s?")
    return len(heading.findall(response)) >= num_sections


def json_format(response: str) -> bool:
    """JSON, with or without a fence around it."""
    text = _FENCE.sub("", response.strip()).removesuffix("```").strip()
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def title(response: str) -> bool:
    """A title like ``<<poem of joy>>``."""
    return any(found.lstrip("<").rstrip(">").strip() for found in _TITLE.findall(response))


def two_responses(response: str) -> bool:
    """Two different answers with ``******`` between them."""
    parts = [part.strip() for part in response.split("******")]
    answers = [part for part in parts if part]
    return all(parts[1:-1]) and len(answers) == 2 and answers[0] != answers[1]


def repeat_prompt(response: str, *, prompt_to_repeat: str) -> bool:
    """The prompt first."""
    return response.strip().lower().startswith(prompt_to_repeat.strip().lower())


def end_checker(response: str, *, end_phrase: str) -> bool:
    """The phrase last."""
    return response.strip().strip('"').lower().endswith(end_phrase.strip().lower())


def quotation(response: str) -> bool:
    """All of it in double quotes."""
    text = response.strip()
    return len(text) > 1 and text[0] == text[-1] == '"'


def no_comma(response: str) -> bool:
    """No comma."""
    return "," not in response


CHECKS: dict[str, Check] = {
    "detectable_format:number_bullet_lists": number_bullet_lists,
    "detectable_format:constrained_response": constrained_response,
    "detectable_format:number_highlighted_sections": number_highlighted_sections,
    "detectable_format:multiple_sections": multiple_sections,
    "detectable_format:json_format": json_format,
    "detectable_format:title": title,
    "combination:two_responses": two_responses,
    "combination:repeat_prompt": repeat_prompt,
    "startend:end_checker": end_checker,
    "startend:quotation": quotation,
    "punctuation:no_comma": no_comma,
}
