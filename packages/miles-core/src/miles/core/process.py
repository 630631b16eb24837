"""A server in a process of its own, owned by the process that started it.

The child lives in its own session (a Ctrl-C at the terminal reaches the owner only), writes to a log file, and is
killed by the kernel when its owner dies, however it dies.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from functools import cache
from pathlib import Path
from urllib.parse import urlsplit

from miles.core.errors import EngineError

_CHILD_PROGRAM = Path(__file__).with_name("child.py")
_POLL_S = 0.05
_LOG_TAIL_LINES = 40


class ChildProcess:
    """One running child.

    ``args`` is the command line, ``env`` holds variables set in addition to the inherited ones, ``log_path`` takes
    standard output and error (appended); without it the child writes where the owner writes.  ``name`` is what errors
    call it.
    """

    def __init__(
        self,
        args: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        log_path: Path | None = None,
        name: str = "child process",
    ) -> None:
        self.name = name
        self.log_path = log_path
        self._log_start = 0
        command = [sys.executable, "-I", "-S", str(_CHILD_PROGRAM), str(os.getpid())]
        command += [f"{key}={value}" for key, value in (env or {}).items()] + ["--", *args]
        with contextlib.ExitStack() as stack:
            log = None
            if log_path is not None:
                log_path.parent.mkdir(parents=True, exist_ok=True)
                log = stack.enter_context(log_path.open("ab"))
                self._log_start = log.tell()
            self._popen = _spawner().run(lambda: _popen(command, log.fileno() if log else None))

    @property
    def pid(self) -> int:
        """Process id, also the id of its session and process group."""
        return self._popen.pid

    @property
    def returncode(self) -> int | None:
        """Exit status, negative for a signal; None while it runs."""
        return self._popen.poll()

    def alive(self) -> bool:
        """Whether the process runs."""
        return self._popen.poll() is None

    def wait_ready(self, url: str, deadline_s: float) -> None:
        """Return when ``GET url`` answers 200; raise EngineError when the child dies or ``deadline_s`` seconds pass."""
        deadline = time.monotonic() + deadline_s
        while True:
            if not self.alive():
                raise EngineError(self.describe_end(" while starting"))
            if _answers(url, min(5.0, max(0.1, deadline - time.monotonic()))):
                return
            if time.monotonic() >= deadline:
                raise EngineError(f"{self.name} did not answer {url} within {deadline_s:.0f} s.{self.log_tail()}")
            time.sleep(_POLL_S)

    def stop(self, deadline_s: float = 10.0) -> None:
        """Ask the whole process group to terminate, kill it after ``deadline_s``; return when the child is gone."""
        if self.alive():
            self._signal_group(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._popen.wait(deadline_s)
        self._signal_group(signal.SIGKILL)
        self._popen.wait()

    def describe_end(self, when: str = "") -> str:
        """How the child ended, and the last lines of its log."""
        return f"{self.name} has ended with status {_status_text(self.returncode)}{when}.{self.log_tail()}"

    def log_tail(self) -> str:
        """The last lines of this child's log, introduced by its path; empty without a log."""
        if self.log_path is None or not self.log_path.exists():
            return ""
        with self.log_path.open("rb") as log:
            log.seek(self._log_start)
            lines = log.read().decode(errors="replace").splitlines()
        return "\n".join([f" End of {self.log_path}:", *lines[-_LOG_TAIL_LINES:]])

    def _signal_group(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._popen.pid, number)


def _status_text(returncode: int | None) -> str:
    if returncode is None:
        return "unknown"
    try:
        return f"{returncode} ({signal.Signals(-returncode).name})" if returncode < 0 else str(returncode)
    except ValueError:  # a real-time signal
        return str(returncode)


class _Spawner:
    """The thread that starts every child.

    The kernel's parent-death signal is sent when the *thread* that forked ends, so children must come from a thread
    that lives as long as the process.
    """

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[tuple[Callable[[], subprocess.Popen[bytes]], Future[subprocess.Popen[bytes]]]] = (
            queue.SimpleQueue()
        )
        threading.Thread(target=self._serve, name="child-spawner", daemon=True).start()

    def run(self, start: Callable[[], subprocess.Popen[bytes]]) -> subprocess.Popen[bytes]:
        future: Future[subprocess.Popen[bytes]] = Future()
        self._jobs.put((start, future))
        return future.result()

    def _serve(self) -> None:
        while True:
            start, future = self._jobs.get()
            try:
                future.set_result(start())
            except OSError as error:
                future.set_exception(error)


@cache
def _spawner() -> _Spawner:
    os.register_at_fork(after_in_child=_spawner.cache_clear)
    return _Spawner()


def _popen(command: list[str], log: int | None) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT if log is not None else None,
        start_new_session=True,
    )


def _answers(url: str, timeout_s: float) -> bool:
    """Whether ``GET url`` answers 200.  Talks to the address itself: proxies of the environment do not apply."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=timeout_s)
    try:
        connection.request("GET", parts.path or "/")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
