"""End-to-end GRPO against TRL's GRPOTrainer: completion tokens per CPU-second, samples per second.  One JSON line.

    python tools/bench/grpo_vs_trl.py --trl-python TRL_VENV/bin/python [--rounds 3] [--checkpoint DIR --data DIR]

Same checkpoint, prompts, reward and knobs (32 prompts x 8 samples, one optimizer step each, fp32).  Our whole process
tree counts: driver and trainer, engine, router, graders.  Start-up is left out on both sides: the first steps are
warm-up.  The two take turns, and the medians of the rounds are compared.  Workloads:

    sums     the quick start's task, responses of up to 40 tokens, as the model ends them
    spread   log-normal response lengths of 16 to 512 tokens (spread_lengths.py), enforced on both sides

Goals: 2 times TRL on ``sums``, 3 times on ``spread``.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Iterator
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
    goal: float
    spread: bool = False


WORKLOADS = (
    Workload("sums", steps=30, warmup=5, goal=2.0),
    Workload("spread", steps=5, warmup=1, goal=3.0, spread=True),
)


def main() -> None:
    options = parse_options()
    with TemporaryDirectory() as temporary:
        work = Path(temporary)
        checkpoint, data = options.checkpoint, Data.at(options.data) if options.data else None
        if checkpoint is None or data is None:
            checkpoint, data = teach(work)
        chosen = [workload for workload in WORKLOADS if workload.name in options.workloads]
        results = {one.name: compare(one, checkpoint, data, options, work) for one in chosen}
    print(json.dumps({"bench": "grpo_vs_trl", "load": os.getloadavg()[0], "cores": os.cpu_count(), **results}))


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--trl-python", type=Path, required=True, help="Python of an environment with trl and datasets")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workloads", nargs="+", default=["sums", "spread"], choices=["sums", "spread"])
    parser.add_argument(
        "--trl-threads", type=int, default=1, help="one was fastest per CPU-second for this small a model"
    )
    parser.add_argument("--checkpoint", type=Path, help="a taught model (default: teach one as the quick start does)")
    parser.add_argument("--data", type=Path, help="the quick start's data directory, with --checkpoint")
    return parser.parse_args()


def teach(work: Path) -> tuple[Path, Data]:
    """The model of the quick start after its demonstrations."""
    model, data = quickstart.prepare(work, seed=0)
    stage = quickstart.demonstrations_stage(work, model, data, seed=0, num_rollout=60)
    process_tree.run([str(miles_command()), *stage.command()[1:]], log=work / "teach.log")
    return work / "taught", data


def compare(
    workload: Workload, checkpoint: Path, data: Data, options: argparse.Namespace, work: Path
) -> dict[str, Any]:
    """Let the two take turns; medians, and ours over theirs."""
    ours, theirs = [], []
    for turn in range(options.rounds):
        place = work / f"{workload.name}-{turn}"
        place.mkdir()
        ours.append(run_miles(workload, checkpoint, data, place))
        theirs.append(run_trl(workload, checkpoint, data, options, place))
    result = {"goal": workload.goal, "miles": medians(ours), "trl": medians(theirs)}
    for name in ("tokens_per_cpu_s", "samples_per_s"):
        result[f"ratio_{name}"] = round(result["miles"][name] / result["trl"][name], 2)
    return result


def run_miles(workload: Workload, checkpoint: Path, data: Data, place: Path) -> Figures:
    """One run of ``miles train``, with everything in the path but evaluation."""
    usual = quickstart.practice_stage(place, data, seed=0, num_rollout=workload.steps)
    flags = {name: value for name, value in usual.flags.items() if not name.startswith(("eval-", "save-"))}
    flags["hf-checkpoint"] = checkpoint
    if workload.spread:
        flags |= {"custom-generate-function-path": "spread_lengths.generate", "rollout-max-response-len": 512}
    stage: Stage = replace(usual, flags=flags)
    metrics = stage.directory / "metrics.jsonl"
    usage = process_tree.run(
        [str(miles_command()), *stage.command()[1:]],
        watch=metrics,
        counts=process_tree.is_rollout,
        log=place / "miles.log",
        env={"PYTHONPATH": str(HERE)},
    )
    lengths = [event["rollout/response_len/mean"] for event in rollout_events(metrics)]
    return figures(workload, usage, lengths)


def run_trl(workload: Workload, checkpoint: Path, data: Data, options: argparse.Namespace, place: Path) -> Figures:
    """One run of ``trl_grpo.py``."""
    marks = place / "trl-marks.jsonl"
    command = [options.trl_python, HERE / "trl_grpo.py", "--checkpoint", checkpoint, "--data", data.train]
    command += ["--marks", marks, "--output", place / "trl", "--steps", workload.steps]
    command += ["--threads", options.trl_threads, *(["--spread"] if workload.spread else [])]
    environment = {"OMP_WAIT_POLICY": "passive", "OMP_NUM_THREADS": str(options.trl_threads)}
    usage = process_tree.run(list(map(str, command)), watch=marks, log=place / "trl.log", env=environment)
    lengths = [json.loads(line)["mean_length"] for line in marks.read_text().splitlines()]
    return figures(workload, usage, lengths)


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
        "start_cpu_s": usage.marks[0].cpu_s,
        "peak_rss_mib": usage.peak_rss_mib,
    }


def medians(runs: list[Figures]) -> Figures:
    """The median of each figure over the rounds."""
    return {name: round(statistics.median(run[name] for run in runs), 3) for name in runs[0]}


if __name__ == "__main__":
    main()
