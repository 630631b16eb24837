"""Runs that are killed without warning, and what two runs are compared by."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import load_file

DEADLINE_S = 240


def kill_when(arguments: list[str], moment: Callable[[], bool]) -> None:
    """Start a run and kill its driver without warning at ``moment``."""
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + DEADLINE_S
    while not moment():
        assert process.poll() is None, "the run ended before the moment came"
        assert time.monotonic() < deadline
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()


def metrics(run: Path) -> list[dict]:
    """Every logged event without the numbers that measure time."""
    events = []
    for line in (run / "metrics.jsonl").read_text().splitlines():
        event = json.loads(line)
        del event["time"]
        event["metrics"] = {name: value for name, value in event["metrics"].items() if not measures_time(name)}
        events.append(event)
    return events


def measures_time(name: str) -> bool:
    return name.startswith("perf/") or "latency" in name or name.endswith(("_s", "_time"))


def exported_weights(run: Path):
    return load_file(run / "hf" / "3" / "model.safetensors")


def samples(run: Path) -> list[tuple]:
    rows = []
    for path in sorted((run / "rollouts").glob("*.jsonl")):
        for line in path.read_text().splitlines():
            row = json.loads(line)
            rows.append((path.name, row["index"], row["tokens"], row["rollout_log_probs"], row["reward"]))
    return rows


def last_checkpoint(run: Path) -> str:
    tracker = run / "latest_checkpointed_iteration.txt"
    return tracker.read_text() if tracker.exists() else ""
