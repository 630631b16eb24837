"""Wall time of a run in which generation and training take equally long, synchronously and asynchronously.

    python tools/bench/async_vs_sync.py [--rollouts 20] [--seconds 0.5] [--spread 0]

Engine and trainer only sleep (two cores are not two machines); driver, rollout role and HTTP are real.  ``--spread``:
standard deviation of the logarithm of response lengths, under which a rollout waits for its longest response.  One JSON
line.

Goal: ``miles train`` takes at least 1.8 times as long as ``miles train-async``.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from simulated_job import prepare, run
from sleeping_engine import sleeping_engine

GOAL = 1.8
TOKENS_PER_S = 100.0
MODES = {
    "train": {},
    "train-async": {"async_training": True},
    "fully_async": {"rollout_function_path": "fully_async", "max_weight_staleness": 2},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rollouts", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=0.5, help="of a mean response, and of training on a rollout")
    parser.add_argument("--spread", type=float, default=0.0)
    options = parser.parse_args()
    found = {}
    with tempfile.TemporaryDirectory() as scratch:
        flags = prepare(Path(scratch))
        flags |= {"num_rollout": options.rollouts, "rollout_batch_size": 8, "n_samples_per_prompt": 4}
        for name, mode in MODES.items():
            engine = {"mean_tokens": int(options.seconds * TOKENS_PER_S), "spread": options.spread}
            with sleeping_engine(tokens_per_s=TOKENS_PER_S, **engine) as port:
                found[name] = run(Path(scratch) / name, port, options.seconds, **flags, **mode)
    ratio = {name: round(found["train"]["seconds"] / found[name]["seconds"], 3) for name in MODES}
    print(
        json.dumps({"bench": "async_vs_sync", "options": vars(options), **found, "times_as_fast": ratio, "goal": GOAL})
    )


if __name__ == "__main__":
    main()
