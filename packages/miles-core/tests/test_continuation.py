"""Turns are continued by ids of new messages alone.  Each family of templates is tested where its tokenizer is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest

from miles.core.continuation import Continuation, Message, TemplateRefusalError

SPECIAL_IDS = frozenset(map(ord, "<>!"))


class Letters:
    """One id per character; ``<`` and ``>`` around messages and ``!`` are special."""

    special_ids = SPECIAL_IDS

    def __init__(self, write: Callable[[Sequence[Message]], str]) -> None:
        self.write = write

    def encode(self, text: str) -> list[int]:
        return [ord(letter) for letter in text]

    def render(self, messages: Sequence[Message], *, prompt: bool, variables: Mapping[str, Any] | None = None) -> str:
        return self.write(messages) + "<a:" * prompt + str((variables or {}).get("think", "")) * prompt


def bracketed(messages: Sequence[Message]) -> str:
    return "".join(f"<{message['role'][0]}:{message['content']}>\n" for message in messages)


def no_system(messages: Sequence[Message]) -> str:
    if messages[0]["role"] == "system":
        raise TemplateRefusalError("no system")
    return bracketed(messages)


@pytest.mark.parametrize("write", [bracketed, no_system])
@pytest.mark.parametrize(
    ("sampled", "dropped", "added"),
    [("yes>\n", 0, "<u:and?>\n<a:"), ("yes>", 0, "\n<u:and?>\n<a:"), ("yes", 0, ">\n<u:and?>\n<a:"),
     ("yes!", 1, ">\n<u:and?>\n<a:"), ("", 0, ">\n<u:and?>\n<a:")],
)  # fmt: skip
def test_only_what_is_missing_is_added(write, sampled, dropped, added):
    letters = Letters(write)
    turn = {"role": "assistant", "content": "yes"}
    appended = [{"role": "user", "content": "and?"}]
    assert Continuation(letters).extend(letters.encode(sampled), turn, appended) == (dropped, letters.encode(added))


def test_variables_reach_the_template():
    letters = Letters(bracketed)
    _, added = Continuation(letters).extend([], {"content": "x"}, [{"role": "user", "content": "a"}], {"think": "no"})
    assert added == letters.encode(">\n<u:a>\n<a:no")


def test_calls_of_the_turn_are_part_of_its_stand_in():
    def write(messages: Sequence[Message]) -> str:
        return "".join(f"{message['content']}{message.get('tool_calls', '')}>" for message in messages)

    letters = Letters(write)
    assert Continuation(letters).extend([], {"tool_calls": ["f"]}, [{"content": "3"}]) == (0, letters.encode(">3><a:"))


@pytest.mark.parametrize(("ids", "rest"), [("x>\n", ""), ("x>", "\n"), ("x", ">\n")])
def test_the_end_of_a_conversation_is_completed(ids, rest):
    letters = Letters(bracketed)
    assert Continuation(letters).end_of_turn(letters.encode(ids)) == letters.encode(rest)


def refuse(messages: Sequence[Message]) -> str:
    raise TemplateRefusalError("never")


@pytest.mark.parametrize(("write", "reason"), [(refuse, "never"), (lambda messages: "", "leaves out")])
def test_templates_that_cannot_be_taken_apart_are_refused(write, reason):
    with pytest.raises(TemplateRefusalError, match=reason):
        Continuation(Letters(write))


def test_turns_that_are_written_differently_later_are_refused():
    continuation = Continuation(Letters(lambda messages: f"{len(messages)}{bracketed(messages)}"))
    with pytest.raises(TemplateRefusalError, match="differently"):
        continuation.extend([], {"content": "x"}, [{"role": "user", "content": "a"}])
