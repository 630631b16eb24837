"""Thousands of prompts in flight at once: does anything stall?

    python tools/bench/in_flight.py [--prompts 10000]

One rollout of so many prompts, one request each, against an engine that answers nothing before all of them are in
flight.  ``stall_s``: the longest time for which the event loop of the rollout role did not come round, and
``stall_cpu_s`` how much of it the loop computed; the rest is other processes' share of the machine.  One JSON line.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import resource
import tempfile
import time
from pathlib import Path

from simulated_job import prepare
from sleeping_engine import sleeping_engine

from miles.core.config import Config
from miles.rollout.manager import RolloutManager

HEARTBEAT_S = 0.01


class Heartbeat:
    """Comes round every 10 ms on an event loop, and notes the longest time it did not."""

    longest_s = longest_cpu_s = 0.0

    async def beat(self) -> None:
        last, last_cpu = time.perf_counter(), time.thread_time()
        while True:
            await asyncio.sleep(HEARTBEAT_S)
            now, cpu = time.perf_counter(), time.thread_time()
            self.longest_s = max(self.longest_s, now - last - HEARTBEAT_S)
            self.longest_cpu_s = max(self.longest_cpu_s, cpu - last_cpu)
            last, last_cpu = now, cpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=10_000)
    options = parser.parse_args()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with tempfile.TemporaryDirectory() as scratch, sleeping_engine(gather=options.prompts, mean_tokens=20) as port:
        flags = prepare(Path(scratch)) | {"rollout_batch_size": options.prompts, "sglang_router_port": port}
        config = Config.of(rollout_external_engine_addrs=[f"127.0.0.1:{port}"], **flags)
        print(json.dumps({"bench": "in_flight", "options": vars(options), **measure(config, Path(scratch) / "run")}))


def measure(config: Config, directory: Path) -> dict[str, float]:
    role, heartbeat = RolloutManager(config, directory), Heartbeat()
    try:
        role.launch()
        role.wait_ready()
        role._runtime.loop.submit(heartbeat.beat())
        start, cpu = time.perf_counter(), time.process_time()
        batch = role.generate(0).batch
        seconds = time.perf_counter() - start
        return {
            "samples": len(batch),
            "seconds": round(seconds, 2),
            "role_cpu_s": round(time.process_time() - cpu, 2),
            "stall_s": round(heartbeat.longest_s, 3),
            "stall_cpu_s": round(heartbeat.longest_cpu_s, 3),
        }
    finally:
        role.stop()


if __name__ == "__main__":
    main()
