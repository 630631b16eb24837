"""End-to-end GRPO against TRL's GRPOTrainer: completion tokens per CPU-second, samples per second.  One JSON line.

    python tools/bench/grpo_vs_trl.py --trl-python TRL_VENV/bin/python [--rounds 3] [--checkpoint DIR --data DIR]

What is compared, and how: ``grpo_job.py``.  Workloads:

    sums     the quick start's task, responses of up to 40 tokens, as the model ends them
    spread   log-normal response lengths of 16 to 512 tokens (spread_lengths.py), enforced on both sides

Goals: 2 times TRL on ``sums``, 3 times on ``spread``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from grpo_job import HERE, SPREAD, SUMS, Opponent, add_options, compare

GOALS = {"sums": 2.0, "spread": 3.0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--trl-python", type=Path, required=True, help="Python of an environment with trl and datasets")
    parser.add_argument("--workloads", nargs="+", default=list(GOALS), choices=list(GOALS))
    add_options(parser)
    options = parser.parse_args()
    workloads = [workload for workload in (SUMS, SPREAD) if workload.name in options.workloads]
    trl = Opponent("trl", options.trl_python, HERE / "trl_grpo.py", options.threads)
    print(json.dumps({"bench": "grpo_vs_trl", **compare(trl, workloads, options, GOALS)}))


if __name__ == "__main__":
    main()
