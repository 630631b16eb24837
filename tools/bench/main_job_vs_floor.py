"""The main job against the same algorithm written down without a framework.  One JSON line.

    python tools/bench/main_job_vs_floor.py [--rounds 3] [--checkpoint DIR --data DIR]

The floor, ``plain_loop.py``, is one process: left-padded batches through transformers' cache, padded training, the
reward inline; no server, no router, no metrics, no samples on disk.  What is compared, and how: ``grpo_job.py``.

Goal: CPU-seconds per step not above the floor's, so at least its tokens per CPU-second.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from grpo_job import HERE, SUMS, Opponent, add_options, compare


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add_options(parser)
    options = parser.parse_args()
    floor = Opponent("floor", Path(sys.executable), HERE / "plain_loop.py", options.threads)
    print(json.dumps({"bench": "main_job_vs_floor", **compare(floor, [SUMS], options, {"sums": 1.0})}))


if __name__ == "__main__":
    main()
