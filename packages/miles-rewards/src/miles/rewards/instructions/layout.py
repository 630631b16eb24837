"""``format:*``: signs and lines of a response."""

from __future__ import annotations

import re
import string
from itertools import pairwise

from miles.rewards.instructions.check import Check
from miles.rewards.instructions.text import EDGES, bare, sentences, tokens

_CLOSING = {")": "(", "]": "[", "}": "{"}
_BRACKET_DEPTH, _QUOTE_DEPTH = 5, 3
_LETTERED = re.compile(r"\W*a\W*b\W*c\W*", re.IGNORECASE)
_NOT_A_QUOTE = string.digits + string.punctuation.replace('"', "")
_TEMPLATE = ("My Answer:", "My Conclusion:", "Future Outlook:")


def parentheses(response: str) -> bool:
    """Brackets nested five deep, the deepest closed by its own kind.  A wrong bracket begins anew."""
    opened: list[str] = []
    deepest = 0
    for sign in response:
        if sign in _CLOSING.values():
            opened.append(sign)
            deepest = max(deepest, len(opened))
        elif sign in _CLOSING:
            if opened and opened[-1] == _CLOSING[sign]:
                opened.pop()
                if deepest >= _BRACKET_DEPTH:
                    return True
            else:
                opened, deepest = [], 0
    return False


def quotes(response: str) -> bool:
    """Double and single quotes nested three deep, and closed again."""
    opened: list[str] = []
    deepest = 0
    for sign in response:
        if opened and sign == opened[-1]:
            opened.pop()
            if deepest - len(opened) >= _QUOTE_DEPTH:
                return True
        elif sign in "\"'":
            opened.append(sign)
            deepest = max(deepest, len(opened))
    return False


def options(response: str, *, options: str) -> bool:
    """One of the options and nothing else; lettered ones to the letter."""
    separator = "/" if "/" in options else "or" if "or" in options else ","
    allowed = [option.strip() for option in options.split(separator)]
    if _LETTERED.match(options):
        return response in allowed
    return response.strip(EDGES).lower() in {option.strip(EDGES).lower() for option in allowed}


def newline(response: str) -> bool:
    """As many lines as words."""
    text = bare(response).strip()
    return len([line for line in text.split("\n") if line]) == len(text.split())


def emoji_sentences(response: str) -> bool:
    """Every sentence has an emoji at its end, or the next one begins with it."""
    stripped = [bare(sentence).strip() for sentence in sentences(response)]
    if not all(stripped):
        return False
    for place, sentence in enumerate(stripped):
        after = stripped[place + 1][0] if place + 1 < len(stripped) else ""
        if not any(_is_emoji(sign) for sign in (*sentence[-2:], after)):
            return False
    return True


def line_indent(response: str) -> bool:
    """Each line is indented further than the one above it."""
    lines = [line for line in response.split("\n") if line.strip()]
    return all(below > above for above, below in pairwise(len(line) - len(line.lstrip(" ")) for line in lines))


def quote_unquote(response: str) -> bool:
    """No quotation follows another at once or stands at the end."""
    text = "".join(response.replace("\u201c", '"').replace("\u201d", '"').replace("'\"'", "").split())
    return '""' not in text and not text.strip(_NOT_A_QUOTE).endswith('"')


def item_list(response: str, *, sep: str) -> bool:
    """Two or more of the sign that takes the place of bullets."""
    return response.count(sep) >= 2


def thesis(response: str) -> bool:
    """Something in HTML italics, and something after it."""
    begin = response.find("<i>") if "<i>" in response else response.find("<em>")
    if begin < 0:
        return False
    text = response[begin:]
    end = text.find("</i>") if "</i>" in text else text.find("</em>")
    return end > 0 and bool(text[3:end].strip()) and bool(text[end + 4 :].strip())


def sub_bullets(response: str) -> bool:
    """Every ``*`` has a ``-`` before the next one."""
    return all("-" in part for part in response.split("*")[1:])


def no_bullets_bullets(response: str) -> bool:
    """Two sentences or more without an empty line among them, then two bullets or more, and nothing else."""
    lines = response.split("\n")
    bullets = [line.strip().startswith("*") for line in lines]
    if True not in bullets:
        return False
    first = bullets.index(True)
    before = "\n".join(lines[:first]).rstrip().split("\n")
    count = sum(len(sentences(line.strip())) for line in before)
    return all(bullets[first:]) and len(bullets) - first >= 2 and all(before) and count >= 2


def title_case(response: str) -> bool:
    """No word in small letters throughout, or with only its first letter small."""
    return not any(word[0].islower() and (len(word) == 1 or _one_case(word[1:])) for word in tokens(response))


def output_template(response: str) -> bool:
    """The three headings of the template."""
    return all(heading in response for heading in _TEMPLATE)


def no_whitespace(response: str) -> bool:
    """Nothing between the words."""
    return not any(sign.isspace() for sign in response)


def _one_case(text: str) -> bool:
    return text.islower() or text.isupper()


def _is_emoji(sign: str) -> bool:
    import emoji  # its table takes a moment, in workers only

    return bool(emoji.is_emoji(sign))


CHECKS: dict[str, Check] = {
    "format:parentheses": parentheses,
    "format:quotes": quotes,
    "format:options": options,
    "format:newline": newline,
    "format:emoji": emoji_sentences,
    "format:line_indent": line_indent,
    "format:quote_unquote": quote_unquote,
    "format:list": item_list,
    "format:thesis": thesis,
    "format:sub-bullets": sub_bullets,
    "format:no_bullets_bullets": no_bullets_bullets,
    "format:title_case": title_case,
    "format:output_template": output_template,
    "format:no_whitespace": no_whitespace,
}
