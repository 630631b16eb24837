"""One GRPO job, run by Miles and by something else: what a step costs on either side.

Same checkpoint, prompts, reward and knobs: 32 prompts x 8 samples of the quick start's task, one optimizer step each,
fp32.  The whole process tree counts: with Miles the driver and trainer, engine, router and graders.  Start-up is left
out: the first steps are warm-up.  The two sides take turns, and medians are compared.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import process_tree
from process_tree import Usage

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "recipes"))

import quickstart  # noqa: E402 - found on the path set above
from stage import Stage, miles_command  # noqa: E402

from addition import Data  # noqa: E402

SAMPLES_PER_STEP = 256
Figures = dict[str, float]


@dataclass(frozen=True, slots=True)
class Workload:
    """What both sides do."""

    name: str
    steps: int
    warmup: int
    """Steps that do not count."""
    spread: bool = False
    """Lengths of ``spread_lengths`` instead of those that the model chooses."""


SUMS = Workload("sums", steps=30, warmup=5)
SPREAD = Workload("spread", steps=5, warmup=1, spread=True)


@dataclass(frozen=True, slots=True)
class Opponent:
    """The other side: a program with the options of ``trl_grpo.py``."""

    name: str
    python: Path
    script: Path
    threads: int


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of every such benchmark."""
    parser.add_argument("--rounds", type=int, default=3, help="turns of each side (default: 3)")
    parser.add_argument(
        "--threads", type=int, default=1, help="of the other side's torch; one serves so small a model best"
    )
    parser.add_argument("--checkpoint", type=Path, help="a taught model (default: teach one as the quick start does)")
    parser.add_argument("--data", type=Path, help="the quick start's data directory, with --checkpoint")


def compare(
    opponent: Opponent, workloads: Sequence[Workload], options: argparse.Namespace, goals: dict[str, float]
) -> dict[str, Any]:
    """Results by workload: medians of both sides, and ours over theirs."""
    results: dict[str, Any] = {"load": os.getloadavg()[0], "cores": os.cpu_count(), "rounds": options.rounds}
    with TemporaryDirectory() as temporary:
        work = Path(temporary)
        checkpoint, data = options.checkpoint, Data.at(options.data) if options.data else None
        if checkpoint is None or data is None:
            checkpoint, data = teach(work)
        for workload in workloads:
            ours, theirs = [], []
            for turn in range(options.rounds):
                place = work / f"{workload.name}-{turn}"
                place.mkdir()
                ours.append(run_miles(workload, checkpoint, data, place))
                theirs.append(run_opponent(opponent, workload, checkpoint, data, place))
            results[workload.name] = verdict(medians(ours), opponent.name, medians(theirs), goals[workload.name])
    return results


def teach(work: Path) -> tuple[Path, Data]:
    """The model of the quick start after its demonstrations."""
    model, data = quickstart.prepare(work, seed=0)
    stage = quickstart.demonstrations_stage(work, model, data, seed=0, num_rollout=80)
    process_tree.run([str(miles_command()), *stage.command()[1:]], log=work / "teach.log")
    return work / "taught", data


def run_miles(workload: Workload, checkpoint: Path, data: Data, place: Path) -> Figures:
    """One run of ``miles train``, with everything in the path but evaluation and checkpoints."""
    usual = quickstart.practice_stage(place, data, seed=0, num_rollout=workload.steps)
    flags = {name: value for name, value in usual.flags.items() if not name.startswith(("eval-", "save-"))}
    flags["hf-checkpoint"] = checkpoint
    if workload.spread:
        flags |= {"custom-generate-function-path": "spread_generator.SpreadLengths", "rollout-max-response-len": 512}
    stage: Stage = replace(usual, flags=flags)
    metrics = stage.directory / "metrics.jsonl"
    usage = process_tree.run(
        [str(miles_command()), *stage.command()[1:]],
        watch=metrics,
        counts=process_tree.is_rollout,
        log=place / "miles.log",
        env={"PYTHONPATH": str(HERE)},
    )
    return figures(workload, usage, [event["rollout/response_len/mean"] for event in rollout_events(metrics)])


def run_opponent(opponent: Opponent, workload: Workload, checkpoint: Path, data: Data, place: Path) -> Figures:
    """One run of the other program."""
    marks = place / "marks.jsonl"
    command = [opponent.python, opponent.script, "--checkpoint", checkpoint, "--data", data.train]
    command += ["--marks", marks, "--output", place / "other", "--steps", workload.steps]
    learning_rate = quickstart.practice_stage(place, data, seed=0, num_rollout=1).flags["lr"]
    command += ["--lr", learning_rate, "--threads", opponent.threads, *(["--spread"] if workload.spread else [])]
    environment = {"OMP_WAIT_POLICY": "passive", "OMP_NUM_THREADS": str(opponent.threads)}
    usage = process_tree.run(list(map(str, command)), watch=marks, log=place / "other.log", env=environment)
    return figures(workload, usage, [json.loads(line)["mean_length"] for line in marks.read_text().splitlines()])


def rollout_events(metrics: Path) -> Iterator[dict[str, float]]:
    """Metrics of each rollout, in order."""
    for line in metrics.read_text().splitlines():
        event = json.loads(line)
        if event["kind"] == "rollout":
            yield event["metrics"]


def figures(workload: Workload, usage: Usage, mean_lengths: list[float]) -> Figures:
    """Rates between the end of the warm-up and the end of the last step."""
    first, last = usage.marks[workload.warmup - 1], usage.marks[workload.steps - 1]
    steps = workload.steps - workload.warmup
    tokens = sum(mean_lengths[workload.warmup :]) * SAMPLES_PER_STEP
    cpu_s, wall_s = last.cpu_s - first.cpu_s, last.wall_s - first.wall_s
    return {
        "tokens_per_cpu_s": tokens / cpu_s,
        "samples_per_s": steps * SAMPLES_PER_STEP / wall_s,
        "tokens_per_s": tokens / wall_s,
        "cpu_s_per_step": cpu_s / steps,
        "s_per_step": wall_s / steps,
        "mean_length": tokens / steps / SAMPLES_PER_STEP,
        "first_step_cpu_s": usage.marks[0].cpu_s,
        "peak_rss_mib": usage.peak_rss_mib,
    }


def medians(runs: list[Figures]) -> Figures:
    """The median of each figure over the rounds."""
    return {name: round(statistics.median(run[name] for run in runs), 3) for name in runs[0]}


def verdict(ours: Figures, name: str, theirs: Figures, goal: float) -> dict[str, Any]:
    """Both sides, and how many times theirs ours is."""
    ratios = {
        f"times_{name}_{rate}": round(ours[rate] / theirs[rate], 2) for rate in ("tokens_per_cpu_s", "samples_per_s")
    }
    return {**ratios, "goal": goal, "miles": ours, name: theirs}
