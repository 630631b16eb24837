"""Verdicts per second and per CPU-second: in this process, through the pool, and through what else there is.

    python tools/bench/rewards.py [--cases FOLDER] [--rounds 5]

The items are recorded responses of models with known verdicts.  ``math`` is our grader, ``math_verify`` the library of
that name, in this process without a clock, with the library's own clock (a signal), and as our reward type.  ``run``:
the dispatcher of a run, which grades ordinary answers at once and sends the others to workers.  Graders forget what
they remember of earlier items after every pass over the cases.  Contenders take turns; each line is JSON with medians.

Goals: the pool costs less than 20 % of the CPU time of the calls themselves; ``math`` gives at least 10 times
math-verify's verdicts per CPU-second at no less agreement.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from process_tree import TICKS_PER_S, tree

from miles.core.config import Config
from miles.core.types import Sample
from miles.rewards.dispatch import Dispatcher
from miles.rewards.math import expression, mathd, plain
from miles.rewards.pool import Job, Pool
from miles.rewards.types import math, math_verify

GROUP = 8
CASES = Path(__file__).parents[2] / "packages/miles-rewards/tests/cases"
Grade = Callable[[], list[float]]
Item = tuple[str, Any, dict[str, Any]]
_left = 0


def cold_math(response: str, label: Any, metadata: dict[str, Any]) -> Any:
    """``math``, as if no item had been seen before."""
    forget_now_and_then(1)
    return math.grade(response, label, metadata)


def forget_now_and_then(num_items: int) -> None:
    """Empty ``math``'s memory once in a hundred items."""
    global _left
    _left -= num_items
    if _left <= 0:
        for function in (mathd._remembered, plain._remembered, expression.parse):
            function.cache_clear()
        _left = 100


def clocked_math_verify(response: str, label: Any, metadata: dict[str, Any]) -> Any:
    """math-verify with its own time-out."""
    from math_verify import parse, verify

    gold, answer = (parse(text, parsing_timeout=5) for text in (f"\\boxed{{{label}}}", response))
    return float(verify(gold, answer, timeout_seconds=5)), ""


@dataclass(frozen=True, slots=True)
class Pass:
    """One way of grading all items, once."""

    wall_s: float
    cpu_s: float
    scores: list[float]


def main() -> None:
    options = parse_options()
    cases = read_cases(options.cases)
    for name, function, repeat in (("math", cold_math, options.repeat), ("math_verify", math_verify.grade, 1)):
        items: list[Item] = [(case["response"], case["label"], {}) for case in cases] * repeat
        expected = [bool(case["expected"]) for case in cases] * repeat
        with contenders(name, function, items) as ways:
            passes: dict[str, list[Pass]] = {way: [] for way in ways}
            for _ in range(options.rounds):
                for way, grade in ways.items():
                    passes[way].append(timed(grade))
        for way, measured in passes.items():
            print(json.dumps(summary(name, way, measured, expected)))


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--cases", type=Path, default=CASES, help="folder with math_recorded.jsonl")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--repeat", type=int, default=100, help="passes of math over the cases in one measurement")
    return parser.parse_args()


def read_cases(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "math_recorded.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@contextmanager
def contenders(name: str, function: Callable[..., Any], items: list[Item]) -> Iterator[dict[str, Grade]]:
    """Ways to grade ``items``, with their processes warm."""
    job = Job(f"{function.__module__.replace('__main__', 'rewards')}:{function.__name__}", timeout_s=30.0)
    pools = {count: Pool(count, preload=("rewards", "math_verify")) for count in (1, 2)}
    executors = {count: ProcessPoolExecutor(count) for count in (1, 2)}
    ways: dict[str, Grade] = {"in_process": lambda: [function(*item)[0] for item in items]}
    if name == "math":
        loop, dispatcher = asyncio.new_event_loop(), Dispatcher(Config.of(rm_type="math"))
        samples = [Sample(response=response, label=label) for response, label, _ in items]
        ways["run"] = lambda: loop.run_until_complete(through_dispatcher(dispatcher, samples))
    else:
        ways["own_clock"] = lambda: [clocked_math_verify(*item)[0] for item in items]
    for count, pool in pools.items():
        ways[f"pool_{count}"] = lambda pool=pool: [result.value[0] for result in pool.map(job, items)]
    for count, executor in executors.items():
        ways[f"executor_{count}"] = lambda executor=executor: [
            verdict[0] for verdict in executor.map(function, *zip(*items), chunksize=32)
        ]
    try:
        for way in ways.values():
            way()
        yield ways
    finally:
        for pool in pools.values():
            pool.close()
        for executor in executors.values():
            executor.shutdown()


async def through_dispatcher(dispatcher: Dispatcher, samples: list[Sample]) -> list[float]:
    """As a rollout does it: the samples of a prompt one after another, each when it is complete."""
    scores = []
    for start in range(0, len(samples), GROUP):
        scores += await asyncio.create_task(score_group(dispatcher, samples[start : start + GROUP]))
    return scores


async def score_group(dispatcher: Dispatcher, samples: list[Sample]) -> list[float]:
    forget_now_and_then(len(samples))
    return [float((await dispatcher.score(sample)).score) for sample in samples]


def timed(grade: Grade) -> Pass:
    cpu_s, started = cpu_seconds(), time.perf_counter()
    scores = grade()
    return Pass(time.perf_counter() - started, cpu_seconds() - cpu_s, scores)


def cpu_seconds() -> float:
    """Of this process, all below it, and those below it that have ended."""
    fields = (Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:15] for pid in tree(os.getpid()))
    return sum(map(int, itertools.chain.from_iterable(fields))) / TICKS_PER_S


def summary(name: str, way: str, passes: list[Pass], expected: list[bool]) -> dict[str, Any]:
    count = len(expected)
    agreeing = sum((score > 0) == wanted for score, wanted in zip(passes[0].scores, expected))
    cpu_s = statistics.median(one.cpu_s for one in passes)
    return {
        "grader": name,
        "way": way,
        "verdicts_per_cpu_s": round(count / cpu_s) if cpu_s else None,
        "verdicts_per_s": round(count / statistics.median(one.wall_s for one in passes)),
        "cpu_us_per_verdict": round(cpu_s / count * 1e6, 1),
        "agreement": round(agreeing / count, 4),
    }


if __name__ == "__main__":
    main()
