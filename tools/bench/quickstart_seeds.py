"""The quick start for three seeds: greedy pass rate on held-out sums before and after practice.  Prints one JSON line.

    python tools/bench/quickstart_seeds.py [--seeds 0 1 2] [--output DIR]

Goal: a rise of at least 0.4 for every seed, each run within 6 minutes on two idle cores.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import process_tree

from miles.core.report import evaluations
from miles.core.run_directory import RunDirectory

RECIPE = Path(__file__).parents[1] / "recipes" / "quickstart.py"
GOAL = 0.4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, help="keep the runs there (default: a temporary directory)")
    options = parser.parse_args()
    with TemporaryDirectory() as temporary:
        output = options.output or Path(temporary)
        output.mkdir(parents=True, exist_ok=True)
        runs = [measure(output, seed) for seed in options.seeds]
    rises = [run["after"]["greedy"] - run["before"]["greedy"] for run in runs]
    print(
        json.dumps(
            {
                "bench": "quickstart_seeds",
                "goal": GOAL,
                "least_rise": min(rises),
                "load": os.getloadavg()[0],
                "runs": runs,
            }
        )
    )
    sys.exit(min(rises) < GOAL)


def measure(output: Path, seed: int) -> dict[str, object]:
    """One run of the recipe."""
    directory = output / f"seed-{seed}"
    command = [sys.executable, str(RECIPE), "--seed", str(seed), "--output", str(directory)]
    usage = process_tree.run(command, log=output / f"seed-{seed}.log")
    found = evaluations(RunDirectory(directory / "grpo"))
    before, after = ({"greedy": one.pass_rate, "tokens": one.mean_length} for one in (found[0], found[-1]))
    return {
        "seed": seed,
        "before": before,
        "after": after,
        "wall_s": round(usage.wall_s, 1),
        "cpu_s": round(usage.cpu_s, 1),
        "peak_rss_mib": round(usage.peak_rss_mib),
    }


if __name__ == "__main__":
    main()
