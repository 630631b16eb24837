"""Token ids of what comes after an assistant's turn, without touching those before it.

What a chat template writes after a turn is found by writing a stand-in conversation that ends in the same kind of
turn, with and without the new messages.  The history itself is never written again, so a template that shortens old
turns (dropping their reasoning, for example) changes nothing about tokens that have been sampled.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any, Protocol

Message = dict[str, Any]

MAX_TRIM_TOKENS = 1
"""Sampled ids that the end of a turn may lose, when it ended otherwise than the template ends turns."""

_SYSTEM: Message = {"role": "system", "content": "S"}
_USER: Message = {"role": "user", "content": "U"}
_HEADS: tuple[list[Message], ...] = ([_SYSTEM], [], [_SYSTEM, _USER], [_USER])
"""Beginnings of stand-in conversations.  Templates differ in what they accept, and in what a user's turn changes."""

_MARK = "7MARK7"


class TemplateRefusalError(ValueError):
    """The chat template cannot write these messages."""


class Template(Protocol):
    """A checkpoint's chat template and tokenizer."""

    @property
    def special_ids(self) -> AbstractSet[int]:
        """Ids that text around them is never merged with, and that ordinary text does not contain."""

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text`` as it stands."""

    def render(self, messages: Sequence[Message], *, prompt: bool, variables: Mapping[str, Any] | None = None) -> str:
        """The conversation as text; with ``prompt``, ready for the assistant's answer.  Raises TemplateRefusalError."""


class Continuation:
    """Continues conversations under one template.  TemplateRefusalError when the template cannot be taken apart."""

    def __init__(self, template: Template) -> None:
        self._template = template
        self.turn_end = self._find_turn_end()
        """What the template writes between an assistant's last word and the next message."""
        self._end_ids = template.encode(self.turn_end)

    def extend(
        self,
        ids: Sequence[int],
        turn: Message,
        appended: Sequence[Message],
        variables: Mapping[str, Any] | None = None,
    ) -> tuple[int, list[int]]:
        """How many of the last ``ids`` to drop (0 or 1), and the ids to append for ``appended`` and a new answer.

        ``ids`` end with the sampled tokens of ``turn``.  What they have of the turn's end already is not added again.
        A special token that ends them otherwise than the template does is dropped.  Raises TemplateRefusalError.
        """
        added = self._template.encode(self._written_after(turn, appended, variables or {}))
        for overlap in range(max(1, len(self._end_ids)), 0, -1):
            if len(added) >= overlap and list(ids[-overlap:]) == added[:overlap]:
                return 0, added[overlap:]
        ends_otherwise = bool(ids) and bool(added) and {ids[-1], added[0]} <= self._template.special_ids
        return int(ends_otherwise), added

    def end_of_turn(self, ids: Sequence[int]) -> list[int]:
        """What the template would add to ``ids``, which end with a turn, before the conversation ends."""
        for overlap in range(len(self._end_ids), 0, -1):
            if list(ids[-overlap:]) == self._end_ids[:overlap]:
                return self._end_ids[overlap:]
        return list(self._end_ids)

    def _find_turn_end(self) -> str:
        turn: Message = {"role": "assistant", "content": _MARK}
        refusals = []
        for head in _HEADS:
            try:
                text = self._template.render([*head, turn], prompt=False)
            except TemplateRefusalError as error:
                refusals.append(str(error))
                continue
            if _MARK in text:
                return text.rpartition(_MARK)[2]
        raise TemplateRefusalError("; ".join(dict.fromkeys(refusals)) or "it leaves out what the assistant says")

    def _written_after(self, turn: Message, appended: Sequence[Message], variables: Mapping[str, Any]) -> str:
        stand_in: Message = {"role": "assistant", "content": _MARK}
        if turn.get("tool_calls"):
            stand_in["tool_calls"] = turn["tool_calls"]
        refusal: TemplateRefusalError | None = None
        for head in _HEADS:
            try:
                before = self._template.render([*head, stand_in], prompt=False, variables=variables)
                after = self._template.render([*head, stand_in, *appended], prompt=True, variables=variables)
            except TemplateRefusalError as error:
                refusal = error
                continue
            body = before.removesuffix(self.turn_end)
            if before.endswith(self.turn_end) and after.startswith(body):
                return after[len(body) :]
        raise refusal or TemplateRefusalError(
            "the chat template writes an assistant's turn differently when messages follow"
        )
