"""Token ids of tools' answers, as the checkpoint's chat template writes them after the call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import miles.core.continuation as core
from miles.core.continuation import Message, TemplateRefusalError
from miles.core.errors import ConfigError
from miles.core.protocols.tools import ToolCall
from miles.rollout.text import ChatTokenizer


class Continuation:
    """Continues conversations under one tokenizer's template; ConfigError when it cannot write tools' answers."""

    def __init__(self, text: ChatTokenizer, variables: Mapping[str, Any]) -> None:
        try:
            self._continuation = core.Continuation(_Template(text, variables))
            self.tool_answers((), (ToolCall("tool"),), ("answer",))
        except TemplateRefusalError as error:
            raise ConfigError(
                f"--hf-checkpoint: its chat template cannot be used for conversations with tools: {error}"
            ) from error

    def tool_answers(self, tokens: Sequence[int], calls: Sequence[ToolCall], answers: Sequence[str]) -> list[int]:
        """Ids to append to ``tokens``, which end with a sampled turn: its end, the answers, the next turn's beginning.

        What the sampled tokens have of it already is not repeated; an end of turn of the model's own choice stays.
        """
        numbered = [(f"call{number:05d}", call) for number, call in enumerate(calls)]
        turn = {"role": "assistant", "tool_calls": [_tool_call(*one) for one in numbered]}
        messages = [
            {"role": "tool", "name": call.name or "unknown", "tool_call_id": number, "content": answer}
            for (number, call), answer in zip(numbered, answers, strict=True)
        ]
        ends_otherwise, added = self._continuation.extend(tokens, turn, messages)
        return added[1:] if ends_otherwise and self._continuation.turn_end else added


class _Template:
    """The tokenizer as ``miles.core.continuation`` wants it."""

    def __init__(self, text: ChatTokenizer, variables: Mapping[str, Any]) -> None:
        self._text, self._variables = text, variables
        self.encode = text.encode
        self.special_ids = frozenset(number for number, token in text.hf.added_tokens_decoder.items() if token.special)

    def render(self, messages: Sequence[Message], *, prompt: bool, variables: Mapping[str, Any] | None = None) -> str:
        chosen = {**self._variables, **(variables or {})}
        try:
            return self._text.render(list(messages), add_generation_prompt=prompt, **chosen)
        except ValueError as error:
            raise TemplateRefusalError(str(error)) from error


def _tool_call(number: str, call: ToolCall) -> dict[str, Any]:
    function = {"name": call.name or "unknown", "arguments": call.arguments}
    return {"id": number, "type": "function", "function": function}
