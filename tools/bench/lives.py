"""The processes of a run that is to be killed: begun, waited for, and looked for when it should be over."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

from process_tree import tree

from miles.core.cli import main as miles

MARK = "MILES_CHAOS_LIFE"
"""Variable that whatever a life starts inherits."""
PARTS = {
    "rank": b"RoleWorker",
    "rollout side": b"_RolloutHost",
    "engine": b"miles.rollout.engines.embedded",
    "router": b"miles.router",
}
"""What is in the command lines of the processes beside the driver."""
END_DEADLINE_S = 30.0
"""For what a driver leaves when it ends or is killed."""
_POLL_S = 0.0005
_CLUSTER = """
import ray, sys
print(ray.init(address="local", num_cpus=4, include_dashboard=False).address_info["gcs_address"], flush=True)
sys.stdin.read()
"""
_numbers = count()


@dataclass(frozen=True)
class Cluster:
    """A Ray cluster that outlives the lives in it."""

    pid: int
    address: str


@contextmanager
def ray_cluster() -> Iterator[Cluster]:
    """One on this machine, for the length of the block.  Drivers have no token of it, and need none."""
    os.environ["RAY_AUTH_MODE"] = "disabled"
    with subprocess.Popen([sys.executable, "-c", _CLUSTER], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as owner:
        assert owner.stdin is not None
        assert owner.stdout is not None
        try:
            yield Cluster(owner.pid, owner.stdout.readline().decode().strip())
        finally:
            owner.stdin.close()


@dataclass
class Life:
    """A process that runs ``miles``, forked with everything imported, and what it starts."""

    pid: int
    log: Path
    cluster: Cluster | None
    mark: str
    seen: set[int] = field(default_factory=set)
    """Every process of it that was ever found."""

    @classmethod
    def begin(cls, arguments: Sequence[str], log: Path, cluster: Cluster | None = None) -> Life:
        """Run ``miles`` with ``arguments``; its output goes to the end of ``log``."""
        mark = f"{os.getpid()}-{next(_numbers)}"
        sys.stdout.flush()
        pid = os.fork()
        if pid == 0:
            _run([*arguments, *(("--ray-address", cluster.address) if cluster else ())], log, mark)
        return cls(pid, log, cluster, mark)

    def wait(self, seconds: float, until: Callable[[], bool] = lambda: False) -> int | None:
        """The driver's exit status; None when it is still there after so many seconds, or at the moment ``until``."""
        deadline = time.monotonic() + seconds
        while True:
            done, status = os.waitpid(self.pid, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status)
            if until() or time.monotonic() >= deadline:
                return None
            time.sleep(_POLL_S)

    def parts(self) -> dict[str, list[int]]:
        """The processes that might be killed: the driver, and those of ``PARTS`` that are there."""
        commands = self._commands()
        found = {
            name: [pid for pid, command in commands.items() if pid != self.pid and title in command]
            for name, title in PARTS.items()
        }
        return {"driver": [self.pid], **{name: pids for name, pids in found.items() if pids}}

    def seconds_to_end(self) -> float:
        """Return when no process of it is left, the driver having ended; SystemExit that names those that stay."""
        start = time.monotonic()
        while left := self._commands():
            if time.monotonic() - start > END_DEADLINE_S:
                raise SystemExit(f"left after {END_DEADLINE_S:.0f} s: {left}\n{self.log.read_text()[-4000:]}")
            time.sleep(0.02)
        return time.monotonic() - start

    def memory(self) -> list[Path]:
        """Buffers in shared memory that it has left: the next life takes them away, and leaves none at its end."""
        return [path for pid in {self.pid, *self.seen} for path in Path("/dev/shm").glob(f"miles-{pid}-*")]

    def _commands(self) -> dict[int, bytes]:
        """Command lines of its processes, by pid.  Those in a cluster of others are known by their titles."""
        mark = f"{MARK}={self.mark}".encode()
        in_cluster = set(tree(self.cluster.pid)) if self.cluster is not None else set()
        found = {}
        for path in Path("/proc").glob("[0-9]*"):
            pid = int(path.name)
            try:
                command = (path / "cmdline").read_bytes()
                marked = mark in (path / "environ").read_bytes().split(b"\0")
            except OSError:  # it has just ended
                continue
            if marked or (pid in in_cluster and any(title in command for title in PARTS.values())):
                found[pid] = command
        self.seen |= found.keys()
        return found


def _run(arguments: list[str], log: Path, mark: str) -> None:
    """In the forked process."""
    os.environ[MARK] = mark
    with log.open("ab", buffering=0) as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    status = 1
    try:
        status = miles(arguments)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    os._exit(status or 0)
