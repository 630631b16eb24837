"""A kill after any system call that writes leaves what was there before, or what comes after: every call is tried."""

import os
import shutil
import signal
import sys
from collections.abc import Callable
from itertools import count
from pathlib import Path

import pytest

from miles.core.driver import checkpoint
from miles.core.driver.checkpoint import DriverState
from miles.core.driver.export import replaced

CALLS = {"open", "close", "mkdir", "rename", "replace", "unlink", "rmdir"}


@pytest.fixture(autouse=True)
def quick_disk(monkeypatch) -> None:
    """Waiting for the disk takes most of the time, and a kill takes nothing from what the kernel has."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def is_killed_after(call: int, act: Callable[[], None]) -> bool:
    """Whether a process that does ``act`` was killed after so many calls that write: it may make fewer."""
    pid = os.fork()
    if pid == 0:
        done = count()

        def kill(frame: object, event: str, function: object) -> None:
            name = getattr(function, "__name__", "")
            if event == "c_return" and name in CALLS and next(done) == call:
                os.kill(os.getpid(), signal.SIGKILL)

        status = 1
        try:
            sys.setprofile(kill)
            act()
            status = 0
        finally:
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status in (0, -signal.SIGKILL)
    return status != 0


def save(directory: Path, rollout_id: int, keep: int | None = None) -> None:
    with checkpoint.publish(directory, DriverState(rollout_id, 0), keep=keep) as partial:
        (partial.actor / "shard").write_text(f"weights {rollout_id}")


def export(directory: Path, text: str) -> None:
    with replaced(directory) as fresh:
        (fresh / "weights").write_text(text)


def leave_two(directory: Path) -> None:
    save(directory, 1)
    save(directory, 2)


def leave_one_without_its_name(directory: Path) -> None:
    """What a kill leaves between the two last steps of publishing."""
    leave_two(directory)
    save(directory, 3)
    (directory / checkpoint.TRACKER_FILE).write_text("2\n")


@pytest.mark.parametrize(("before", "keep"), [(leave_two, None), (leave_two, 1), (leave_one_without_its_name, 2)])
def test_a_kill_anywhere_leaves_a_whole_checkpoint_in_force(tmp_path, before, keep):
    before(tmp_path / "before")
    for call in count():
        run = shutil.copytree(tmp_path / "before", tmp_path / str(call))
        killed = is_killed_after(call, lambda run=run: save(run, 3, keep))
        found = checkpoint.latest(run)
        assert found.state.rollout_id in ((2, 3) if killed else (3,))
        assert (found.actor / "shard").read_text() == f"weights {found.state.rollout_id}"
        save(run, 4, keep=2)
        assert checkpoint.latest(run).state.rollout_id == 4
        assert not list(run.glob(".*"))
        if not killed:
            break
    assert call > len(CALLS)


def test_a_kill_anywhere_leaves_a_whole_export(tmp_path):
    export(tmp_path / "before" / "hf", "old")
    for call in count():
        folder = shutil.copytree(tmp_path / "before", tmp_path / str(call))
        killed = is_killed_after(call, lambda folder=folder: export(folder / "hf", "new"))
        with replaced(folder / "hf") as fresh:
            assert (folder / "hf" / "weights").read_text() in (("old", "new") if killed else ("new",))
            (fresh / "weights").write_text("newer")
        assert [path.name for path in folder.iterdir()] == ["hf"]
        if not killed:
            break
    assert call > len(CALLS)
