"""Verdicts per second and per CPU-second: in this process, through the pool, and through what else there is.

    python tools/bench/rewards.py [--cases FOLDER] [--rounds 5] [--grader math]

The items are recorded responses of models with known verdicts, each a text of its own in memory.  ``math`` is our
grader, ``math_verify`` the library of that name, in this process without a clock, with the library's own clock (a
signal), and as our reward type.  ``run`` and ``run_group``: the dispatcher of a run, which grades ordinary answers at
once and sends the others to workers, sample by sample and by the group.  Graders forget what they remember of earlier
items once in a hundred.  ``two_processes``: two plain processes at the same time, each with half of the items and no
pool.  Where two cores share caches, memory and clock, or are one core's two threads, a call costs more CPU time while
the other core works too: that is the part of ``pool_2`` and ``executor_2`` that no way of sending calls can avoid.

Contenders take turns, each round in another order; each line is JSON with medians.  ``over_in_process`` and
``over_two_processes`` are those of the rounds' own ratios of CPU time.

Goals: the pool costs less than 20 % of the CPU time of the calls themselves; ``math`` gives at least 10 times
math-verify's verdicts per CPU-second at no less agreement.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import statistics
import time
from array import array
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
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
GRADERS = ("math", "math_verify")
CASES = Path(__file__).parents[2] / "packages/miles-rewards/tests/cases"
Grade = Callable[[], list[float]]
ScoreGroup = Callable[[Dispatcher, list[Sample]], Coroutine[Any, Any, list[float]]]
Item = tuple[str, Any, dict[str, Any]]
_left = 0


def cold_math(response: str, label: Any, metadata: dict[str, Any]) -> Any:
    """``math``, as if no item had been seen before."""
    forget_now_and_then()
    return math.grade(response, label, metadata)


def forget_now_and_then() -> None:
    """Empty ``math``'s memory once in a hundred calls.  Every way of grading pays for one of them per item."""
    global _left
    _left -= 1
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
    graders = {"math": (cold_math, options.repeat), "math_verify": (math_verify.grade, 1)}
    for name in options.grader:
        function, repeat = graders[name]
        items: list[Item] = [
            (case["response"], case["label"], {}) for _ in range(repeat) for case in read_cases(options.cases)
        ]
        expected = [bool(case["expected"]) for case in cases] * repeat
        with contenders(name, function, items) as ways:
            passes = take_turns(ways, options.rounds)
        for way in passes:
            print(json.dumps({"grader": name, "way": way, **summary(way, passes, expected)}), flush=True)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--cases", type=Path, default=CASES, help="folder with math_recorded.jsonl")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--grader", nargs="+", choices=GRADERS, default=GRADERS)
    parser.add_argument("--repeat", type=int, default=100, help="passes of math over the cases in one measurement")
    return parser.parse_args()


def read_cases(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "math_recorded.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@contextmanager
def contenders(name: str, function: Callable[..., Any], items: list[Item]) -> Iterator[dict[str, Grade]]:
    """Ways to grade ``items``, with their processes warm."""
    job = Job(f"{function.__module__.replace('__main__', 'rewards')}:{function.__name__}", timeout_s=30.0)
    with ExitStack() as stack:
        plain = TwoProcesses(function, items)  # first: it forks, and pools have threads
        stack.callback(plain.close)
        pools = {count: stack.enter_context(Pool(count, preload=("rewards", "math_verify"))) for count in (1, 2)}
        executors = {count: stack.enter_context(ProcessPoolExecutor(count)) for count in (1, 2)}
        ways: dict[str, Grade] = {
            "in_process": lambda: [function(*item)[0] for item in items],
            "two_processes": plain.grade,
        }
        if name == "math":
            ways |= ways_of_a_run(items, stack)
        else:
            ways["own_clock"] = lambda: [clocked_math_verify(*item)[0] for item in items]
        for count, pool in pools.items():
            ways[f"pool_{count}"] = lambda pool=pool: [result.value[0] for result in pool.map(job, items)]
        for count, executor in executors.items():
            ways[f"executor_{count}"] = lambda executor=executor: [
                verdict[0] for verdict in executor.map(function, *zip(*items), chunksize=32)
            ]
        for way in ways.values():
            way()
        yield ways


def ways_of_a_run(items: list[Item], stack: ExitStack) -> dict[str, Grade]:
    """Through the dispatcher of ``--rm-type math``."""
    loop, dispatcher = asyncio.new_event_loop(), Dispatcher(Config.of(rm_type="math"))
    stack.callback(loop.close)
    stack.callback(lambda: loop.run_until_complete(dispatcher.close()))
    samples = [Sample(response=response, label=label) for response, label, _ in items]
    return {
        name: lambda score=score: loop.run_until_complete(through_dispatcher(dispatcher, samples, score))
        for name, score in (("run", score_one_by_one), ("run_group", score_group))
    }


class TwoProcesses:
    """Two processes that grade half of the items each, together, whenever they are told to."""

    def __init__(self, function: Callable[..., Any], items: list[Item]) -> None:
        context, middle = multiprocessing.get_context("fork"), len(items) // 2
        self._wires: list[Connection] = []
        self._processes = []
        for share in (items[:middle], items[middle:]):
            ours, theirs = context.Pipe()
            self._wires.append(ours)
            self._processes.append(context.Process(target=self._serve, args=(function, share, theirs), daemon=True))
            self._processes[-1].start()

    def _serve(self, function: Callable[..., Any], items: list[Item], wire: Connection) -> None:
        for ours in self._wires:  # so that the wire ends when the one who tells us does
            ours.close()
        with suppress(EOFError):
            while wire.recv():
                wire.send_bytes(array("d", [function(*item)[0] for item in items]).tobytes())

    def grade(self) -> list[float]:
        for wire in self._wires:
            wire.send(True)
        return [score for wire in self._wires for score in array("d", wire.recv_bytes())]

    def close(self) -> None:
        for wire, process in zip(self._wires, self._processes):
            wire.close()
            process.join()


async def through_dispatcher(dispatcher: Dispatcher, samples: list[Sample], score: ScoreGroup) -> list[float]:
    """As a rollout does it, prompt by prompt; in one task, as those of the rollout are there anyway."""
    scores = []
    for start in range(0, len(samples), GROUP):
        scores += await score(dispatcher, samples[start : start + GROUP])
    return scores


async def score_one_by_one(dispatcher: Dispatcher, samples: list[Sample]) -> list[float]:
    """Each sample when it is complete."""
    scores = []
    for sample in samples:
        forget_now_and_then()
        scores.append(float((await dispatcher.score(sample)).score))
    return scores


async def score_group(dispatcher: Dispatcher, samples: list[Sample]) -> list[float]:
    """All when the last is complete."""
    for _ in samples:
        forget_now_and_then()
    return [float(outcome.score) for outcome in await dispatcher.score_group(samples)]


def take_turns(ways: dict[str, Grade], rounds: int) -> dict[str, list[Pass]]:
    """The passes of each way.  Each round begins with another one: none always follows the same neighbour's heat."""
    passes: dict[str, list[Pass]] = {way: [] for way in ways}
    order = list(ways)
    for _ in range(rounds):
        for way in order:
            passes[way].append(timed(ways[way]))
        order = order[1:] + order[:1]
    return passes


def timed(grade: Grade) -> Pass:
    """One pass; another one if a worker was replaced in it: what that had used is gone with it."""
    while True:
        pids = list(tree(os.getpid()))
        cpu_s, started = cpu_seconds(pids), time.perf_counter()
        scores = grade()
        wall_s = time.perf_counter() - started
        with suppress(ProcessLookupError):
            return Pass(wall_s, cpu_seconds(pids) - cpu_s, scores)


def cpu_seconds(pids: list[int]) -> float:
    """Of processes, their threads included: exact, where what /proc says is late by a tick of the scheduler.

    Raises ProcessLookupError when one of them has ended.
    """
    try:
        return sum(time.clock_gettime((~pid << 3) | 2) for pid in pids)  # Linux's number of a process's clock
    except OSError as error:
        raise ProcessLookupError("a process has ended") from error


def summary(way: str, passes: dict[str, list[Pass]], expected: list[bool]) -> dict[str, Any]:
    measured, count = passes[way], len(expected)
    agreeing = [sum((score > 0) == wanted for score, wanted in zip(one.scores, expected)) for one in measured]
    cpu_s = statistics.median(one.cpu_s for one in measured)
    row = {
        "verdicts_per_cpu_s": round(count / cpu_s),
        "verdicts_per_s": round(count / statistics.median(one.wall_s for one in measured)),
        "cpu_us_per_verdict": round(cpu_s / count * 1e6, 1),
        "over_in_process": over(measured, passes["in_process"]),
    }
    if way.endswith("_2"):
        row["over_two_processes"] = over(measured, passes["two_processes"])
    return {**row, "agreement": round(min(agreeing) / count, 4)}


def over(passes: list[Pass], bare: list[Pass]) -> float:
    """CPU time as a multiple of that of ``bare`` in the same round."""
    return round(statistics.median(one.cpu_s / other.cpu_s for one, other in zip(passes, bare)), 3)


if __name__ == "__main__":
    main()
