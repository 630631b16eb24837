"""A generate function that harms an engine once, in mid-rollout.  The environment says with which sample and signal."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from pathlib import Path

from miles.core.types.rollout import GenerateFnInput, GenerateFnOutput
from miles.rollout.generators.single_turn import SingleTurn

ENGINES = (b"miles.rollout.engines.embedded", b"miles_sglang.serve_cpu")
AFTER_S = 0.05
_generate = SingleTurn()
_harmed = threading.Event()
"""A sample that was lost is generated again; its second time harms nobody."""


async def generate(input: GenerateFnInput) -> GenerateFnOutput:
    if (port := _victim(input)) is not None:
        asyncio.get_running_loop().call_later(AFTER_S, harm, port)
    return await _generate(input)


async def generate_after_harm(input: GenerateFnInput) -> GenerateFnOutput:
    """Let others be on their way when the harm is done, and the sample itself not: it needs what was lost."""
    if (port := _victim(input)) is not None:
        await asyncio.sleep(AFTER_S)
        harm(port)
    return await _generate(input)


def _victim(input: GenerateFnInput) -> str | None:
    """Port of the engine to be harmed, when it is time for that."""
    lethal = input.sample.index == int(os.environ["LETHAL_SAMPLE"]) and not input.evaluation
    if not lethal or _harmed.is_set():
        return None
    _harmed.set()
    first: str = input.state.args.runtime.engine_urls()[0]
    return first.rpartition(":")[2]


def harm(port: str) -> None:
    (engine,) = [process for process in Path("/proc").glob("[0-9]*") if _listens(process, port)]
    os.kill(int(engine.name), signal.Signals[os.environ["LETHAL_SIGNAL"]])


def _listens(process: Path, port: str) -> bool:
    try:
        command = (process / "cmdline").read_bytes().split(b"\0")
    except OSError:  # it has just ended
        return False
    return any(engine in command for engine in ENGINES) and port.encode() in command and _leads(int(process.name))


def _leads(process_id: int) -> bool:
    """An engine has a session of its own; processes that it forks may show its command line."""
    try:
        return os.getsid(process_id) == process_id
    except ProcessLookupError:
        return False
