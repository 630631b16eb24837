"""Tools that a model calls: what a definition, a call and a parser of calls are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

ToolSpec = Mapping[str, Any]
"""OpenAI's form: ``{"type": "function", "function": {"name", "description", "parameters": JSON schema}}``."""


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One call that a model wrote.  ``problem``: why it cannot be executed as it was written."""

    name: str
    arguments: dict[str, Any] = field(default_factory=dict)
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class ToolTurn:
    """What a model said in one turn: the text beside its calls, and the calls in order."""

    text: str
    calls: tuple[ToolCall, ...] = ()


class ToolCallParser(Protocol):
    """Finds the calls in a turn.  ``miles.tool_parsers`` entry points name a function of this shape.

    ``text`` has its special tokens written out, but not the one that ended the turn.  ``tools`` tell the types of
    arguments where a format writes them as plain text.  A call that is malformed is a call with a ``problem``, so that
    the model can be told; only text that is no call at all is left in the turn's text.
    """

    def __call__(self, text: str, tools: Sequence[ToolSpec]) -> ToolTurn: ...
