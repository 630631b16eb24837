"""``custom:*``: single tasks with one right form."""

from __future__ import annotations

import csv
import io
import re
import string
import unicodedata
from itertools import pairwise

from miles.rewards.instructions import lexicon
from miles.rewards.instructions.check import Check
from miles.rewards.instructions.text import EDGES, bare, sentences

_MULTIPLES = [str(number) for number in range(14, 50, 7)]
_QUESTION = re.compile(r"\n*Question \d+[.|):;]?\s*")
_OPTION = re.compile(r"[A-Ea-e][.|)]\s*\w+")
_AFRICA_LINES = 52
_DATE = re.compile(r"(\d{4})-(\d{2})-(\d{2})")
_LONGEST_MONTH = {2: 29, 4: 30, 6: 30, 9: 30, 11: 30}
_NAPOLEON = range(1769, 1822)
_QUOTED_SIGN = re.compile(r'".*[^\d\w\s].*"')


def multiples(response: str) -> bool:
    """The multiples of 7 between 10 and 50."""
    return re.findall(r"\d+", response) == _MULTIPLES


def mcq_count_length(response: str) -> bool:
    """Four questions with five options each, each longer than the one before, and no word before the first."""
    if not response.startswith("Question"):
        return False
    found = [part.strip() for part in _QUESTION.split(response) if part.strip()]
    lengths = [_question_length(question) for question in found]
    return len(lengths) == 4 and None not in lengths and all(a < b for a, b in pairwise(n or 0 for n in lengths))


def reverse_newline(response: str) -> bool:
    """Africa's countries from Zimbabwe on, a line each, in falling order."""
    lines = [line for line in (raw.strip(EDGES) for raw in response.split("\n")) if line]
    first = next((place for place, line in enumerate(lines) if "Zimbabwe" in line), len(lines))
    names = [_ascii(line) for line in lines[first:]]
    return len(names) >= _AFRICA_LINES and names == sorted(names, reverse=True)


def word_reverse(response: str) -> bool:
    """The bald eagle in one sentence, its words in reverse order."""
    text = " ".join(reversed(bare(response.lower()).split()))
    return "bald eagle" in text and text in sentences(text)


def character_reverse(response: str) -> bool:
    """The bald eagle, letter by letter from the end."""
    return "elgae dlab" in response.lower()


def sentence_alphabet(response: str) -> bool:
    """26 sentences, which begin with the letters of the alphabet."""
    starts = [sentence.lstrip(string.punctuation + string.whitespace)[:1].lower() for sentence in sentences(response)]
    return starts == list(string.ascii_lowercase)


def european_capitals_sort(response: str) -> bool:
    """The capitals north of 45 degrees, from north to south, with commas between them."""
    return [name.strip() for name in _ascii(response).split(",") if name.strip()] == lexicon.words("capitals")


def csv_city(response: str) -> bool:
    """A header and seven rows of five columns."""
    rows = list(csv.reader(io.StringIO(response)))
    return len(rows) == 8 and rows[0] == ["ID", "Country", "City", "Year", "Count"] and all(len(r) == 5 for r in rows)


def csv_special_character(response: str) -> bool:
    """A header and fourteen rows of five columns, one field in quotes with a sign that is no letter, digit or space."""
    if not _has_header(response, ("ProductID", "Category", "Brand", "Price", "Stock"), r",[ \t]*"):
        return False
    rows = _rows_with_quotes(response, ",")
    quoted = next((place for place, row in enumerate(rows[1:], 1) if any(map(_QUOTED_SIGN.match, row))), None)
    return len(rows) == 15 and quoted is not None and all(len(row) == 5 for row in rows[1 : quoted + 1])


def csv_quotes(response: str) -> bool:
    """A header and three rows of five columns, with tabs between them and every field in quotes."""
    if not _has_header(response, ("StudentID", "Subject", "Grade", "Semester", "Score"), r"\t *"):
        return False
    rows = _rows_with_quotes(response, "\t")
    fields = [field.strip() for row in rows for field in row]
    shaped = len(rows) == 4 and all(len(row) == 5 for row in rows)
    return shaped and all(field.startswith('"') and field.endswith('"') for field in fields)


def date_format_list(response: str) -> bool:
    """Dates of Napoleon's life as YYYY-MM-DD, with commas between them."""
    return all(_is_date(part.strip()) for part in response.strip().split(","))


def _question_length(question: str) -> int | None:
    """Characters before the options; None unless there are five of them."""
    lines = [line.strip() for line in question.split("\n")]
    options = [place for place, line in enumerate(lines) if _OPTION.match(line)]
    return len(" ".join(lines[: options[0]]).strip()) if len(options) == 5 else None


def _ascii(text: str) -> str:
    return unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()


def _has_header(response: str, names: tuple[str, ...], separator: str) -> bool:
    pattern = separator.join(rf'(?:{name}|"{name}")' for name in names)
    return re.fullmatch(pattern, response.split("\n")[0].strip()) is not None


def _rows_with_quotes(response: str, delimiter: str) -> list[list[str]]:
    """Rows whose fields keep their quotes."""
    return list(csv.reader(io.StringIO(response.replace('"', '"""')), delimiter=delimiter))


def _is_date(text: str) -> bool:
    match = _DATE.fullmatch(text)
    if match is None:
        return False
    year, month, day = map(int, match.groups())
    return year in _NAPOLEON and month <= 12 and day <= _LONGEST_MONTH.get(month, 31)


CHECKS: dict[str, Check] = {
    "custom:multiples": multiples,
    "custom:mcq_count_length": mcq_count_length,
    "custom:reverse_newline": reverse_newline,
    "custom:word_reverse": word_reverse,
    "custom:character_reverse": character_reverse,
    "custom:sentence_alphabet": sentence_alphabet,
    "custom:european_capitals_sort": european_capitals_sort,
    "custom:csv_city": csv_city,
    "custom:csv_special_character": csv_special_character,
    "custom:csv_quotes": csv_quotes,
    "custom:date_format_list": date_format_list,
}
