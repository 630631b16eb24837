"""However a run ends, it says why, and leaves no process and no shared memory behind."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import MILES

pytestmark = pytest.mark.e2e

DEADLINE_S = 120


class Run:
    """A run of very many rollouts, from which a test takes what it needs."""

    def __init__(self, flags: list[str], directory: Path) -> None:
        self.directory = directory
        self.process = subprocess.Popen(
            [MILES, "train", *flags],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def wait_for(self, name: str) -> None:
        """Return when the run has written the file ``name``."""
        deadline = time.monotonic() + DEADLINE_S
        while not (self.directory / name).exists():
            assert self.process.poll() is None, self.process.stdout.read()
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def children(self, program: str = "") -> list[int]:
        """Ids of the processes below the run, at any depth, whose command line holds ``program``."""
        found, parents = [], {self.process.pid}
        for pid, (parent, command) in sorted(processes().items()):
            if parent in parents:
                parents.add(pid)
                if program in command:
                    found.append(pid)
        return found

    def end(self) -> tuple[int, str]:
        """Exit status and output."""
        output, _ = self.process.communicate(timeout=DEADLINE_S)
        return self.process.returncode, output


def processes() -> dict[int, tuple[int, str]]:
    """Parent and command line of every living process."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            state, parent = (path / "stat").read_text().rpartition(")")[2].split()[:2]
            command = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:  # it has just ended
            continue
        if state != "Z":
            found[int(path.name)] = (int(parent), command)
    return found


def shared_memory_of(pid: int) -> list[Path]:
    return list(Path("/dev/shm").glob(f"miles-{pid}-*"))


@pytest.fixture
def run(toy, tmp_path) -> Iterator[Run]:
    directory = tmp_path / "run"
    started = Run([*toy.flags(directory), "--num-rollout", "100000", "--save-interval", "100000"], directory)
    try:
        started.wait_for("rollouts/rollout_0000001.jsonl")
        yield started
    finally:
        if started.process.poll() is None:
            started.process.kill()
            started.process.communicate(timeout=60)


@pytest.mark.parametrize(
    ("number", "status", "words"),
    [
        (signal.SIGINT, 130, "miles train: interrupted"),
        (signal.SIGTERM, 143, "ended by SIGTERM"),
    ],
)
def test_signal_ends_everything(run, number, status, words):
    children = run.children()
    assert len(children) >= 2, "an engine and a router run"
    assert shared_memory_of(run.process.pid)
    run.process.send_signal(number)
    returned, output = run.end()
    assert returned == status
    assert output.endswith(f"{words}\n")
    assert not set(children) & processes().keys()
    assert not shared_memory_of(run.process.pid)


@pytest.mark.parametrize("program", ["miles.rollout.engines.embedded", "miles.router"])
def test_server_that_dies_ends_the_run_at_once_and_is_named(run, program):
    children = run.children()
    (victim,) = run.children(f"-m {program} ")
    os.kill(victim, signal.SIGKILL)
    killed_at = time.monotonic()
    status, output = run.end()
    assert time.monotonic() - killed_at < 60
    assert status == 1
    last = output.splitlines()[-20:]
    assert any("has ended" in line for line in last), output[-2000:]
    assert "Traceback" not in output
    assert not set(children) & processes().keys()


def test_second_start_of_a_running_run_is_refused_and_harms_nothing(run, toy, miles):
    before = (run.directory / "config.json").read_text()
    second = miles("train", *toy.flags(run.directory), check=False)
    assert second.returncode == 2
    assert f"pid {run.process.pid} on " in second.stderr
    assert (run.directory / "config.json").read_text() == before
    assert run.process.poll() is None
