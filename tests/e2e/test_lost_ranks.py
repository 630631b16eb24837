"""A rank of the trainer that is killed: the run names it and ends at once; started again, it goes on bit for bit."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from conftest import MILES
from killing import exported_weights, last_checkpoint, metrics

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(280)]

DEADLINE_S = 120


def flags(toy, run: Path, samples: Path) -> list[str]:
    """Two ranks on recorded samples, with a checkpoint after every rollout."""
    return [
        *("--train-backend", "fsdp", "--device", "cpu", "--actor-num-gpus-per-node", "2", "--train-num-threads", "1"),
        *("--hf-checkpoint", str(toy.checkpoint), "--load-debug-rollout-data", str(samples / "{rollout_id}.jsonl")),
        *("--num-rollout", "4", "--rollout-batch-size", "4", "--n-samples-per-prompt", "4", "--lr", "1e-2"),
        *("--num-steps-per-rollout", "2", "--use-dynamic-batch-size", "--max-tokens-per-gpu", "256"),
        *("--rm-type", "deterministic_random", "--save", str(run), "--save-interval", "1"),
        *("--save-hf", str(run / "hf" / "{rollout_id}"), "--train-env-vars", '{"OF_THE_RANKS": "yes"}'),
    ]


@pytest.fixture(scope="module")
def samples(toy, miles, tmp_path_factory) -> Path:
    """Those of one rollout, as those of every rollout."""
    folder = tmp_path_factory.mktemp("samples")
    pattern = ("--save-debug-rollout-data", str(folder / "{rollout_id}.jsonl"))
    short = ("--num-rollout", "1", "--eval-interval", "1000", "--skip-eval-before-train")
    miles("train", *toy.flags(folder / "run", *short, *pattern))
    for rollout_id in range(1, 4):
        (folder / f"{rollout_id}.jsonl").write_bytes((folder / "0.jsonl").read_bytes())
    return folder


def ranks_of(driver: int) -> list[int]:
    """The processes of Ray that hold ranks of a run, by id."""
    parents, found = {}, []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(path.name)] = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            if b"RoleWorker" in (path / "cmdline").read_bytes():
                found.append(int(path.name))
        except OSError:  # it has just ended
            continue

    def is_below(pid: int) -> bool:
        return pid == driver or (pid in parents and pid > 1 and is_below(parents[pid]))

    return sorted(pid for pid in found if is_below(pid))


def test_a_killed_rank_is_named_and_the_run_goes_on_bit_for_bit(toy, miles, samples, tmp_path):
    quiet, run = tmp_path / "quiet", tmp_path / "run"
    miles("train", *flags(toy, quiet, samples))
    driver = subprocess.Popen(
        [MILES, "train", *flags(toy, run, samples)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    deadline = time.monotonic() + DEADLINE_S
    try:
        while not last_checkpoint(run):
            assert driver.poll() is None, driver.stdout.read()
            assert time.monotonic() < deadline
            time.sleep(0.002)
        victim = ranks_of(driver.pid)[-1]
        assert b"OF_THE_RANKS=yes" in Path(f"/proc/{victim}/environ").read_bytes().split(b"\0")
        os.kill(victim, signal.SIGKILL)
        killed = time.monotonic()
        said, _ = driver.communicate(timeout=DEADLINE_S)
    finally:
        driver.kill()
        driver.wait()
    assert driver.returncode != 0
    assert time.monotonic() - killed < 90.0
    assert "of the actor has died" in said
    assert "Start the run again with the same command" in said
    miles("train", *flags(toy, run, samples))
    assert metrics(run) == metrics(quiet)
    expected, found = exported_weights(quiet), exported_weights(run)
    assert all((expected[name] == found[name]).all() for name in expected)
