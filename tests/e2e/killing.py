"""Runs that are killed without warning, and what two runs are compared by."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import load_file

DEADLINE_S = 240
_ATTEMPTS = 8


def killed_run(
    command: Callable[[Path], list[str]], folder: Path, moment: Callable[[Path], bool], *, checkpoint: str
) -> Path:
    """The directory of a run that was killed without warning at ``moment``, when ``checkpoint`` was its last one.

    A busy machine lets a moment slip by; then another run is killed.
    """
    for attempt in range(_ATTEMPTS):
        run = folder / f"killed-{attempt}"
        if _kill_at(command(run), lambda run=run: moment(run)) and last_checkpoint(run) == checkpoint:
            return run
    raise AssertionError(f"the moment was missed {_ATTEMPTS} times")


def _kill_at(arguments: list[str], moment: Callable[[], bool]) -> bool:
    """Start a run and kill its driver; False when it ended before the moment was seen."""
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + DEADLINE_S
    try:
        while not moment() and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        ended = process.poll()
    finally:
        process.kill()
        process.wait()
    assert ended in (None, 0), f"the run ended with {ended}"
    return ended is None


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
    return tracker.read_text().strip() if tracker.exists() else ""
