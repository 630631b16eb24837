"""Verdicts per second and per CPU-second: in this process, through the pool, and through what else there is.

    python tools/bench/rewards.py [--cases FOLDER] [--rounds 5]

The items are recorded responses of models with known verdicts, each a text of its own in memory.  ``math`` is our
grader, ``math_verify`` the library of that name, in this process without a clock, with the library's own clock (a
signal), and as our reward type.  ``run`` and ``run_group``: the dispatcher of a run, which grades ordinary answers at
once and sends the others to workers, sample by sample and by the group.  Graders forget what they remember of earlier
items once in a hundred.  Contenders take turns; each line is JSON with medians, ``over_in_process`` that of the rounds'
own ratios of CPU time.

Goals: the pool costs less than 20 % of the CPU time of the calls themselves; ``math`` gives at least 10 times
math-verify's verdicts per CPU-second at no less agreement.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import time
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from process_tree import tree

from miles.core.config import Config
from miles.core.types import Sample
from miles.rewards.dispatch import Dispatcher
from miles.rewards.math import expression, mathd, plain
from miles.rewards.pool import Job, Pool
from miles.rewards.types import math, math_verify

GROUP = 8
CASES = Path(__file__).parents[2] / "packages/miles-rewards/tests/cases"
Grade = Callable[[], list[float]]
ScoreGroup = Callable[[Dispatcher, list[Sample]], Coroutine[Any, Any, list[float]]]
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
        items: list[Item] = [
            (case["response"], case["label"], {}) for _ in range(repeat) for case in read_cases(options.cases)
        ]
        expected = [bool(case["expected"]) for case in cases] * repeat
        with contenders(name, function, items) as ways:
            passes: dict[str, list[Pass]] = {way: [] for way in ways}
            for _ in range(options.rounds):
                for way, grade in ways.items():
                    passes[way].append(timed(grade))
        for way, measured in passes.items():
            print(json.dumps(summary(name, way, measured, passes["in_process"], expected)), flush=True)


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
        ways["run"] = lambda: loop.run_until_complete(through_dispatcher(dispatcher, samples, score_one_by_one))
        ways["run_group"] = lambda: loop.run_until_complete(through_dispatcher(dispatcher, samples, score_group))
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


async def through_dispatcher(dispatcher: Dispatcher, samples: list[Sample], score: ScoreGroup) -> list[float]:
    """As a rollout does it, prompt by prompt; in one task, as those of the rollout are there anyway."""
    scores = []
    for start in range(0, len(samples), GROUP):
        scores += await score(dispatcher, samples[start : start + GROUP])
    return scores


async def score_one_by_one(dispatcher: Dispatcher, samples: list[Sample]) -> list[float]:
    """Each sample when it is complete."""
    forget_now_and_then(len(samples))
    return [float((await dispatcher.score(sample)).score) for sample in samples]


async def score_group(dispatcher: Dispatcher, samples: list[Sample]) -> list[float]:
    """All when the last is complete."""
    forget_now_and_then(len(samples))
    return [float(outcome.score) for outcome in await dispatcher.score_group(samples)]


def timed(grade: Grade) -> Pass:
    cpu_s, started = cpu_seconds(), time.perf_counter()
    scores = grade()
    return Pass(time.perf_counter() - started, cpu_seconds() - cpu_s, scores)


def cpu_seconds() -> float:
    """Of this process and all below it, their threads included.  None of them ends while this bench measures."""
    threads = (thread for pid in tree(os.getpid()) for thread in Path(f"/proc/{pid}/task").glob("*/schedstat"))
    return sum(int(thread.read_text().split()[0]) for thread in threads) / 1e9


def summary(name: str, way: str, passes: list[Pass], in_process: list[Pass], expected: list[bool]) -> dict[str, Any]:
    count = len(expected)
    agreeing = sum((score > 0) == wanted for score, wanted in zip(passes[0].scores, expected))
    cpu_s = statistics.median(one.cpu_s for one in passes)
    return {
        "grader": name,
        "way": way,
        "verdicts_per_cpu_s": round(count / cpu_s),
        "verdicts_per_s": round(count / statistics.median(one.wall_s for one in passes)),
        "cpu_us_per_verdict": round(cpu_s / count * 1e6, 1),
        "over_in_process": round(statistics.median(one.cpu_s / bare.cpu_s for one, bare in zip(passes, in_process)), 3),
        "agreement": round(agreeing / count, 4),
    }


if __name__ == "__main__":
    main()
