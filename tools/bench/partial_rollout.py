"""What partial rollout saves: tokens that the engine generates for each token that is trained on.

    python tools/bench/partial_rollout.py [--rollouts 10] [--spread 1.0]

Prompts are submitted twice over; a rollout takes what is ready first and cuts the rest.  Without ``--partial-rollout``
the tokens of what was cut are generated again, with it they are gone on with.  One JSON line.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from simulated_job import prepare, run
from sleeping_engine import sleeping_engine

MODES = {"partial": {"partial_rollout": True}, "whole": {}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rollouts", type=int, default=10)
    parser.add_argument("--spread", type=float, default=1.0)
    options = parser.parse_args()
    found = {}
    with tempfile.TemporaryDirectory() as scratch:
        flags = prepare(Path(scratch))
        flags |= {"num_rollout": options.rollouts, "rollout_batch_size": 8, "over_sampling_batch_size": 16}
        for name, mode in MODES.items():
            with sleeping_engine(tokens_per_s=500, mean_tokens=200, spread=options.spread) as port:
                found[name] = run(Path(scratch) / name, port, 0.0, **flags, **mode)
    wasted = {name: round(one["generated_tokens"] / one["tokens"], 3) for name, one in found.items()}
    print(json.dumps({"bench": "partial_rollout", "options": vars(options), **found, "generated_per_trained": wasted}))


if __name__ == "__main__":
    main()
