"""Executing tool calls: whatever goes wrong becomes an answer that the model reads."""

from __future__ import annotations

import asyncio
import inspect
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from miles.core.protocols.tools import ToolCall, ToolSpec
from miles.core.tools.schema import find, function_of, problem_with
from miles.rollout import threads

MOST_ANSWER_CHARS = 32_768
"""A longer answer is cut: one tool must not fill the context, nor the event loop with tokenizing."""


@dataclass(frozen=True, slots=True)
class ToolAnswer:
    """What the model gets to read.  ``failure``: ``malformed``, ``unknown_tool``, ``bad_arguments``, ``timeout``,
    ``error`` or ``bad_result``; None when the tool did its work."""

    content: str
    failure: str | None = None
    seconds: float = 0.0


class ToolRunner:
    """Calls ``execute(name, arguments)``: a function, a coroutine function, or a class without constructor arguments
    whose objects are such.  A call may take ``deadline_s`` seconds."""

    def __init__(self, execute: Any, deadline_s: float) -> None:
        made: Any = execute() if inspect.isclass(execute) else execute
        self._execute: Callable[..., Any] = made
        self._deadline_s = deadline_s

    async def run(self, call: ToolCall, tools: Sequence[ToolSpec]) -> ToolAnswer:
        """The tool's answer, or what is wrong with the call."""
        if call.problem is not None:
            return _failed("malformed", f"the call cannot be read: {call.problem}")
        function = find(call.name, tools)
        if tools and function is None:
            known = ", ".join(str(function_of(spec).get("name")) for spec in tools)
            return _failed("unknown_tool", f"there is no tool {call.name!r}; there are: {known}")
        problem = None if function is None else problem_with(call.arguments, function)
        if problem is not None:
            return _failed("bad_arguments", f"{call.name}: {problem}")
        return await self._call(call)

    async def _call(self, call: ToolCall) -> ToolAnswer:
        start = time.perf_counter()
        try:
            async with asyncio.timeout(self._deadline_s) as deadline:
                result = await threads.call(self._execute, call.name, call.arguments)
            answer = _answer(result)
        except Exception as error:  # a function of the user's: the call is its domain of failure
            if isinstance(error, TimeoutError) and deadline.expired():
                answer = _failed("timeout", f"{call.name} did not answer within {self._deadline_s:g} seconds")
            else:
                answer = _failed("error", f"{call.name}: {type(error).__name__}: {error}")
        return ToolAnswer(answer.content, answer.failure, time.perf_counter() - start)


def _answer(result: Any) -> ToolAnswer:
    if not isinstance(result, str):
        try:
            result = json.dumps(result, ensure_ascii=False)
        except (TypeError, ValueError):
            return _failed("bad_result", f"the tool returned a {type(result).__name__}, expected text")
    return ToolAnswer(_cut(result))


def _failed(kind: str, why: str) -> ToolAnswer:
    return ToolAnswer(_cut(f"Error: {why}"), kind)


def _cut(text: str) -> str:
    left_out = len(text) - MOST_ANSWER_CHARS
    return text if left_out <= 0 else f"{text[:MOST_ANSWER_CHARS]}\n[{left_out} more characters]"
