"""What a session has seen: turns whose token ids only ever grow at the end.

The ids of turn n are those of turn n - 1, less ``trimmed`` of its last ones, plus ``added`` (the new messages and the
words that prompt the answer), plus ``output`` (what the engine sampled).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from miles.core.continuation import Continuation, Message
from miles.router.sessions.messages import BadMessageError, same
from miles.router.sessions.template import ChatTemplate


@dataclass(frozen=True, slots=True)
class Generation:
    """What an engine sampled in one turn.  N = number of sampled tokens."""

    output: list[int]
    """N token ids."""
    logps: list[float]
    """N natural-log probabilities."""
    finish: str
    """``stop``, ``length`` or ``abort``."""
    versions: list[str]
    """Weight versions that took part, in order."""
    token_versions: list[int] | None
    """N weight versions; None when they are not whole numbers."""
    cached_tokens: int = 0
    """Prompt tokens that the engine had in its prefix cache."""
    routed_experts: str | None = None
    """Base64 of little-endian int32, one row for each token but the last, prompt included."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One request and its answer."""

    messages: list[Message]
    """New ones of the request."""
    reply: Message
    trimmed: int
    added: list[int]
    generation: Generation


@dataclass(frozen=True, slots=True)
class Plan:
    """How a request continues a trajectory: after ``kept`` turns, with ``ids`` as the engine's prompt."""

    kept: int
    messages: list[Message]
    trimmed: int
    added: list[int]
    ids: list[int]


@dataclass(slots=True)
class Trajectory:
    """A line of turns.  ``tools`` are those of the first request, whose text is part of the prompt."""

    turns: list[Turn] = field(default_factory=list)
    tools: list[Any] | None = None

    @property
    def ids(self) -> list[int]:
        """All token ids, sampled ones included."""
        return accumulate(self.turns)

    def messages(self) -> list[Message]:
        """The conversation as the client knows it."""
        return [message for turn in self.turns for message in (*turn.messages, turn.reply)]

    def kept_turns(self, messages: Sequence[Message], tools: list[Any] | None) -> int:
        """Number of turns that ``messages`` continue: all of them, or all but the last.  Raises BadMessageError."""
        kept, position = 0, 0
        for turn in self.turns:
            stored = [*turn.messages, turn.reply]
            if not all(same(*pair) for pair in zip(stored, messages[position:])):
                break
            if position + len(stored) >= len(messages):
                break
            kept, position = kept + 1, position + len(stored)
        if kept < len(self.turns) - 1:
            raise BadMessageError(
                f"the messages continue {kept} of the session's {len(self.turns)} turns: a request must begin with the "
                "messages of all turns, or of all but the last"
            )
        if kept and tools and tools != self.tools:
            raise BadMessageError("'tools' differ from those of the session's first request, whose tokens are fixed")
        new = messages[position:]
        if kept and any(message["role"] == "assistant" for message in new):
            raise BadMessageError("a message of the assistant follows that was not generated in this session")
        return kept

    def commit(self, plan: Plan, turn: Turn, tools: list[Any] | None) -> None:
        """Add the answer to the request that ``plan`` was made for."""
        del self.turns[plan.kept :]
        if not plan.kept:
            self.tools = tools
        self.turns.append(turn)


def make_plan(
    template: ChatTemplate,
    continuation: Continuation,
    turns: Sequence[Turn],
    messages: Sequence[Message],
    tools: list[Any] | None,
    variables: Mapping[str, Any],
) -> Plan:
    """Token ids for ``messages``, of which the first ones are those of ``turns``.  Raises TemplateRefusalError."""
    if not turns:
        added = template.tokenizer.encode(template.render(messages, tools=tools, prompt=True, variables=variables))
        return Plan(0, list(messages), 0, added, added)
    new = list(messages[sum(len(turn.messages) + 1 for turn in turns) :])
    ids = accumulate(turns)
    trimmed, added = continuation.extend(ids, turns[-1].reply, new, variables)
    return Plan(len(turns), new, trimmed, added, ids[: len(ids) - trimmed] + added)


def accumulate(turns: Sequence[Turn]) -> list[int]:
    """The token ids of ``turns`` in a row."""
    ids: list[int] = []
    for turn in turns:
        del ids[len(ids) - turn.trimmed :]
        ids += turn.added
        ids += turn.generation.output
    return ids
