"""What a model said, taken apart: reasoning, words, tool calls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from miles.core.protocols.tools import ToolCall, ToolCallParser
from miles.core.registry import Registry

_MARKS = (
    ("<arg_key>", "glm"),
    ("<function=", "qwen3_coder"),
    ("<tool_call>", "hermes"),
    ("[TOOL_CALLS]", "mistral"),
    ("<|tool_call_begin|>", "kimi_k2"),
    ("<｜tool▁call▁begin｜>", "deepseekv3"),
    ("<|python_tag|>", "llama3"),
)
"""What a chat template says where it shows calls, most telling first, and the parser that reads them."""


@dataclass(frozen=True, slots=True)
class Spoken:
    """One turn of a model.  ``reasoning`` is None when there is none, or when it is left in the words."""

    words: str
    reasoning: str | None = None
    calls: tuple[ToolCall, ...] = ()


class Listener:
    """Takes turns apart.  Raises PluginError when there is no such parser."""

    def __init__(self, tool_parser: str, template_source: str, *, reasoning: bool) -> None:
        name = _guess(template_source) if tool_parser == "auto" else tool_parser
        self._parse: ToolCallParser | None = None if name == "none" else Registry("miles.tool_parsers").get(name)
        self._reasoning = reasoning

    def __call__(self, text: str, tools: Sequence[Any] | None) -> Spoken:
        """Words and calls of ``text``.  When a call is malformed, all is words: the agent sees what was written."""
        thought, rest = _split_reasoning(text) if self._reasoning else (None, text)
        if self._parse is None or not tools:
            return Spoken(rest, thought)
        turn = self._parse(rest, tools)
        if not turn.calls or any(call.problem is not None for call in turn.calls):
            return Spoken(rest, thought)
        return Spoken(turn.text, thought, turn.calls)


def _guess(template_source: str) -> str:
    return next((name for mark, name in _MARKS if mark in template_source), "none")


def _split_reasoning(text: str) -> tuple[str | None, str]:
    before, end, after = text.partition("</think>")
    if end:
        return before.removeprefix("<think>").strip("\n"), after.lstrip("\n")
    if text.startswith("<think>"):
        return text.removeprefix("<think>").strip("\n"), ""
    return None, text
