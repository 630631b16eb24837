from __future__ import annotations

import asyncio
import time
from typing import Any

from lateness import ATTEMPTS, LIMIT_S, lateness

from miles.core.protocols.tools import ToolCall
from miles.rollout.tools.execution import MOST_ANSWER_CHARS, ToolRunner


async def test_a_synchronous_tool_does_not_hold_up_the_loop() -> None:
    def slow(name: str, params: dict[str, Any]) -> str:
        time.sleep(0.5)
        return "done"

    runner = ToolRunner(slow, 60.0)
    for attempts_left in reversed(range(ATTEMPTS)):
        work = asyncio.gather(*(runner.run(ToolCall("f"), []) for _ in range(64)))
        late = await lateness(work)
        assert {answer.content for answer in await work} == {"done"}
        if late < LIMIT_S:
            break
        assert attempts_left, f"late by {late:.3f} s"


async def test_a_tool_that_hangs_is_given_up_and_harms_no_other() -> None:
    def hang(name: str, params: dict[str, Any]) -> str:
        time.sleep(3600.0 if name == "hang" else 0.0)
        return "done"

    hung = [ToolRunner(hang, 0.3).run(ToolCall("hang"), []) for _ in range(40)]
    answers = await asyncio.gather(*hung, ToolRunner(hang, 60.0).run(ToolCall("work"), []))
    assert {answer.failure for answer in answers[:-1]} == {"timeout"}
    assert "within 0.3 seconds" in answers[0].content
    assert (answers[-1].content, answers[-1].failure) == ("done", None)


async def test_a_coroutine_that_hangs_is_cancelled() -> None:
    cancelled = []

    async def hang(name: str, params: dict[str, Any]) -> str:
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            cancelled.append(name)
            raise
        return ""

    assert (await ToolRunner(hang, 0.05).run(ToolCall("f"), [])).failure == "timeout"
    assert cancelled == ["f"]


async def test_a_timeout_inside_a_tool_is_its_own_error() -> None:
    async def tool(name: str, params: dict[str, Any]) -> str:
        raise TimeoutError("the database")

    answer = await ToolRunner(tool, 5.0).run(ToolCall("f"), [])
    assert (answer.failure, answer.content) == ("error", "Error: f: TimeoutError: the database")


async def test_plain_values_are_written_as_json_and_others_refused() -> None:
    async def tool(name: str, params: dict[str, Any]) -> Any:
        return params["value"]

    runner = ToolRunner(tool, 5.0)
    assert (await runner.run(ToolCall("f", {"value": {"é": [1, None]}}), [])).content == '{"é": [1, null]}'
    assert (await runner.run(ToolCall("f", {"value": object()}), [])).failure == "bad_result"


async def test_a_class_is_constructed_once_and_called() -> None:
    class Counter:
        def __init__(self) -> None:
            self.calls = 0

        async def __call__(self, name: str, params: dict[str, Any]) -> str:
            self.calls += 1
            return str(self.calls)

    runner = ToolRunner(Counter, 5.0)
    assert [(await runner.run(ToolCall("f"), [])).content for _ in range(2)] == ["1", "2"]


async def test_a_long_answer_is_cut() -> None:
    async def tool(name: str, params: dict[str, Any]) -> str:
        return "x" * (MOST_ANSWER_CHARS + 7)

    content = (await ToolRunner(tool, 5.0).run(ToolCall("f"), [])).content
    assert content.endswith("x\n[7 more characters]")


async def test_time_is_measured() -> None:
    async def tool(name: str, params: dict[str, Any]) -> str:
        await asyncio.sleep(0.05)
        return ""

    assert (await ToolRunner(tool, 5.0).run(ToolCall("f"), [])).seconds >= 0.04
