"""The quick start's practice on the embedded engine and on SGLang: do they learn the same?  Prints one JSON line.

    python tools/bench/engines_learn.py --quickstart runs/quickstart-0 --sglang-python SGLANG/bin/python

Starts from the taught model of a quick start.  The embedded engine practises with two seeds, which shows what chance
does; SGLang takes its weights through shared memory in one run and over a process group in the other.  Fails when the
curves differ by more than chance, or when an engine's log-probabilities are not the trainer's.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import process_tree

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))

from quickstart import practice_stage
from stage import RECIPES, miles_command

import addition
from miles.core.run_directory import RunDirectory

LARGEST_DIFFERENCE = 1e-4
"""Mean |engine - trainer log-probability| of any step, in float32."""
TAIL = 5
"""Rollouts at the end that are compared."""


def main() -> None:
    options = parse_options()
    with TemporaryDirectory() as temporary:
        output = options.output or Path(temporary)
        runs = {name: practise(options, output / name, flags) for name, flags in contenders(options).items()}
    chance = abs(runs["embedded"]["end"] - runs["embedded_other_seed"]["end"])
    apart = max(abs(runs["embedded"]["end"] - run["end"]) for name, run in runs.items() if "sglang" in name)
    worst = max(run["logprob_abs_diff"] for run in runs.values())
    agree = apart <= max(2 * chance, 0.05) and worst < LARGEST_DIFFERENCE
    result = {"bench": "engines_learn", "apart": apart, "chance": chance, "load": os.getloadavg()[0], "runs": runs}
    print(json.dumps(result))
    sys.exit(not agree)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--quickstart", type=Path, required=True, help="directory of a quick start, with taught and data"
    )
    parser.add_argument("--sglang-python", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--output", type=Path, help="keep the runs there (default: a temporary directory)")
    return parser.parse_args()


def contenders(options: argparse.Namespace) -> dict[str, dict[str, object]]:
    """Flags of each run beside the recipe's."""
    sglang = {"rollout-engine": "sglang", "sglang-python": options.sglang_python}
    return {
        "embedded": {},
        "embedded_other_seed": {"seed": 1, "rollout-seed": 1},
        "sglang_shm": sglang | {"update-weight-transport": "shm"},
        "sglang_broadcast": sglang | {"update-weight-transport": "broadcast"},
    }


def practise(options: argparse.Namespace, directory: Path, flags: dict[str, object]) -> dict[str, float]:
    """One run; rewards at its beginning and end, and how far the engine's log-probabilities are from the trainer's."""
    directory.mkdir(parents=True, exist_ok=True)
    stage = practice_stage(directory, addition.Data.at(options.quickstart / "data"), 0, options.steps)
    own = {
        "hf-checkpoint": options.quickstart / "taught",
        "eval-interval": options.steps,
        "save-interval": options.steps,
    }
    command = type(stage)(stage.directory, stage.num_rollout, {**stage.flags, **own, **flags}).command()
    usage = process_tree.run(
        ["env", f"PYTHONPATH={RECIPES}", str(miles_command()), *command[1:]], log=directory / "log.txt"
    )
    events = [json.loads(line) for line in (RunDirectory(stage.directory).path / "metrics.jsonl").open()]
    rewards = [event["metrics"]["rollout/raw_reward"] for event in events if event["kind"] == "rollout"]
    steps = [event["metrics"] for event in events if event["kind"] == "train"]
    return {
        "begin": round(rewards[0], 3),
        "end": round(statistics.fmean(rewards[-TAIL:]), 3),
        "logprob_abs_diff": max(step["train/train_rollout_logprob_abs_diff"] for step in steps),
        "wall_s": round(usage.wall_s, 1),
        "cpu_s": round(usage.cpu_s, 1),
    }


if __name__ == "__main__":
    main()
