"""The zygote: a small process that imports graders once and forks workers on request.

A killed worker is replaced in milliseconds, the user's ``__main__`` is not imported again (as spawning would), and the
threaded, perhaps CUDA-holding trainer is never forked.
"""

from __future__ import annotations

import gc
import importlib
import os
import pickle
import signal
import socket
from contextlib import suppress

from miles.rewards.pool.job import Limits
from miles.rewards.pool.progress import Progress
from miles.rewards.pool.wire import frame, read_frame
from miles.rewards.pool.worker import serve

_MAX_REQUEST_BYTES = 4096


def main(control_fd: int, page_fd: int) -> None:
    """Serve the pool at the other end of ``control_fd`` until it goes away."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then closes us
    control = socket.socket(fileno=control_fd)
    boot = read_frame(control)
    if boot is None:
        return
    num_slots, limits, preload = pickle.loads(boot)  # noqa: S301 (from our parent)
    progress = Progress(page_fd, num_slots)
    os.close(page_fd)
    problem = _import_all(preload)
    gc.collect()
    gc.freeze()  # collected pages would otherwise be copied into every worker
    control.sendall(frame(problem.encode("utf-8", "replace")))
    _Nursery(control, progress, limits).run()


def _import_all(modules: tuple[str, ...]) -> str:
    """Import ``modules``; why the first that fails does not load, or an empty string."""
    for module in modules:
        try:
            importlib.import_module(module)
        except Exception as error:
            return f"cannot import {module}: {type(error).__name__}: {error}"
    return ""


class _Nursery:
    """Forks and buries workers.  A dead worker keeps its pid until the pool asks, so no pid is ever mistaken."""

    def __init__(self, control: socket.socket, progress: Progress, limits: Limits) -> None:
        self._control = control
        self._progress = progress
        self._limits = limits
        self._pids: set[int] = set()

    def run(self) -> None:
        try:
            while self._serve_one():
                pass
        finally:
            for pid in list(self._pids):
                self._kill(pid)

    def _serve_one(self) -> bool:
        request, fds, _, _ = socket.recv_fds(self._control, _MAX_REQUEST_BYTES, 1)
        if not request:
            return False
        # One request is on its way at a time: the pool waits for each answer.
        verb, number = request.decode().split()
        if verb == "fork":
            pid = self._fork(fds[0], int(number))
            self._control.sendall(frame(str(pid).encode()))
        else:
            self._kill(int(number))
            self._control.sendall(frame(b"killed"))
        return True

    def _fork(self, fd: int, slot: int) -> int:
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                self._control.close()
                serve(socket.socket(fileno=fd), self._progress, slot, self._limits)
                status = 0
            finally:
                os._exit(status)
        os.close(fd)
        self._pids.add(pid)
        return pid

    def _kill(self, pid: int) -> None:
        if pid in self._pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            self._pids.discard(pid)
