"""Kill -9 at any moment and start again with the same command: the run ends as if nothing had happened."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

pytestmark = pytest.mark.e2e

DEADLINE_S = 240


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


def command(toy, run: Path) -> list[str]:
    flags = toy.flags(run, "--save-hf", str(run / "hf" / "{rollout_id}"))
    return [str(Path(sys.executable).with_name("miles")), "train", *flags]


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


@pytest.fixture(scope="module")
def uninterrupted(toy, tmp_path_factory):
    run = tmp_path_factory.mktemp("whole") / "run"
    subprocess.run(command(toy, run), check=True, timeout=DEADLINE_S, capture_output=True)
    return run


def last_checkpoint(run: Path) -> str:
    tracker = run / "latest_checkpointed_iteration.txt"
    return tracker.read_text() if tracker.exists() else ""


MOMENTS = {
    "generating the third rollout": lambda run: last_checkpoint(run) == "1",
    "training on the third rollout": lambda run: (run / "rollouts" / "rollout_0000002.jsonl").exists(),
    "writing the third checkpoint": lambda run: (run / ".iter_0000002.partial").exists(),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_run_continues_bit_for_bit(toy, miles, tmp_path, uninterrupted, moment):
    run = tmp_path / "run"
    kill_when(command(toy, run), lambda: MOMENTS[moment](run))
    assert last_checkpoint(run) == "1", f"killed while {moment}, the second checkpoint is in force"
    miles(*command(toy, run)[1:])
    assert metrics(run) == metrics(uninterrupted)
    assert samples(run) == samples(uninterrupted)
    expected, found = exported_weights(uninterrupted), exported_weights(run)
    assert expected.keys() == found.keys()
    assert all((expected[name] == found[name]).all() for name in expected)


def test_finished_run_started_again_only_evaluates_again(toy, miles, uninterrupted):
    before = metrics(uninterrupted), samples(uninterrupted)
    miles(*command(toy, uninterrupted)[1:])
    assert (metrics(uninterrupted), samples(uninterrupted)) == before
