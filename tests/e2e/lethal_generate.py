"""A generate function that harms an engine while it generates.  The environment says with which sample and signal."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

from miles.core.types.rollout import GenerateFnInput, GenerateFnOutput
from miles.rollout.generators.single_turn import SingleTurn

ENGINE = b"miles.rollout.engines.embedded"
AFTER_S = 0.05
_generate = SingleTurn()


async def generate(input: GenerateFnInput) -> GenerateFnOutput:
    if input.sample.index == int(os.environ["LETHAL_SAMPLE"]) and not input.evaluation:
        asyncio.get_running_loop().call_later(AFTER_S, harm)
    return await _generate(input)


def harm() -> None:
    engines = [int(stat.parent.name) for stat in Path("/proc").glob("[0-9]*/stat") if _is_own_engine(stat)]
    os.kill(min(engines), signal.Signals[os.environ["LETHAL_SIGNAL"]])


def _is_own_engine(stat: Path) -> bool:
    try:
        parent = int(stat.read_text().rpartition(")")[2].split()[1])
        return parent == os.getpid() and ENGINE in stat.with_name("cmdline").read_bytes()
    except OSError:  # it has just ended
        return False
