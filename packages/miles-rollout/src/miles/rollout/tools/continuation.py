"""Token ids of what a chat template writes after an assistant's turn, without touching the turn or what is before it.

A stand-in conversation is written with and without the tools' answers; the difference is what they add.  So nothing
that was sampled is ever tokenized again, and a template that rewrites old turns changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from miles.core.errors import ConfigError, RolloutError
from miles.core.protocols.tools import ToolCall
from miles.rollout.text import ChatTokenizer

_MARK = "stand-in"
_USER = {"role": "user", "content": _MARK}


class Continuation:
    """Continues conversations under one tokenizer's template; ConfigError when it cannot write tools' answers."""

    def __init__(self, text: ChatTokenizer, variables: Mapping[str, Any]) -> None:
        self._text, self._variables = text, variables
        self._special = frozenset(number for number, token in text.hf.added_tokens_decoder.items() if token.special)
        try:
            self._turn_end = self._find_turn_end()
            self._written((ToolCall("tool"),), ("answer",))
        except (ValueError, RolloutError) as error:
            raise ConfigError(
                f"--hf-checkpoint: its chat template cannot be used for conversations with tools: {error}"
            ) from error

    def tool_answers(self, tokens: Sequence[int], calls: Sequence[ToolCall], answers: Sequence[str]) -> list[int]:
        """Ids to append to ``tokens``, which end with a sampled turn: its end, the answers, the next turn's beginning.

        What the sampled tokens have of it already is not repeated; an end of turn of the model's own choice stays.
        """
        added = self._text.encode(self._written(calls, answers))
        for overlap in range(min(len(added), len(tokens), _LONGEST_OVERLAP), 0, -1):
            if list(tokens[-overlap:]) == added[:overlap]:
                return added[overlap:]
        ends_otherwise = bool(tokens) and tokens[-1] in self._special and self._turn_end and added[0] in self._special
        return added[1:] if ends_otherwise else added

    def _find_turn_end(self) -> str:
        text = self._render([_USER, {"role": "assistant", "content": _MARK}])
        if text.count(_MARK) < 2:
            raise RolloutError("it does not write what the assistant says as it stands")
        return text.rpartition(_MARK)[2]

    def _written(self, calls: Sequence[ToolCall], answers: Sequence[str]) -> str:
        """The text from the end of the assistant's turn on."""
        numbered = [(f"call{number:05d}", call) for number, call in enumerate(calls)]
        turn = {"role": "assistant", "content": _MARK, "tool_calls": [_tool_call(*one) for one in numbered]}
        messages = [
            {"role": "tool", "name": call.name or "unknown", "tool_call_id": number, "content": answer}
            for (number, call), answer in zip(numbered, answers, strict=True)
        ]
        before = self._render([_USER, turn])
        after = self._render([_USER, turn, *messages], prompt=True)
        body = before.removesuffix(self._turn_end)
        if not before.endswith(self._turn_end) or not after.startswith(body):
            raise RolloutError("it writes an assistant's turn differently when a tool's answer follows")
        return after[len(body) :]

    def _render(self, messages: list[dict[str, Any]], *, prompt: bool = False) -> str:
        return self._text.render(messages, add_generation_prompt=prompt, **self._variables)


_LONGEST_OVERLAP = 8


def _tool_call(number: str, call: ToolCall) -> dict[str, Any]:
    function = {"name": call.name or "unknown", "arguments": call.arguments}
    return {"id": number, "type": "function", "function": function}
