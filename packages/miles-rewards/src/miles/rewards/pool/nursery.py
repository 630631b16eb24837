"""The pool's end of the zygote: start it, have it fork and kill, stop it."""

from __future__ import annotations

import os
import pickle
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress

from miles.core.errors import RewardError
from miles.rewards.pool.job import Limits
from miles.rewards.pool.progress import Progress
from miles.rewards.pool.wire import frame, read_frame

_ANSWER_DEADLINE_S = 30.0
_STOP_DEADLINE_S = 5.0

# The search path of the parent is handed over so that a user's reward function is found as it is there.
_PROGRAM = "import sys; sys.path[:] = {path!r}; from miles.rewards.pool.zygote import main; main({control}, {page})"


class Nursery:
    """One zygote process.  Its owner calls ``stop``."""

    def __init__(self, num_slots: int, limits: Limits, preload: Sequence[str], load_timeout_s: float) -> None:
        """Start the zygote; return when it has imported ``preload``.  Raises RewardError when that fails."""
        self._children: set[int] = set()
        page_fd = Progress.allocate(num_slots)
        try:
            self.progress = Progress(page_fd, num_slots)
            self._control, theirs = socket.socketpair()
            with theirs:
                self._process = self._spawn(theirs.fileno(), page_fd)
        finally:
            os.close(page_fd)
        try:
            self._boot(num_slots, limits, tuple(preload), load_timeout_s)
        except BaseException:
            self.stop()
            raise

    @staticmethod
    def _spawn(control_fd: int, page_fd: int) -> subprocess.Popen[bytes]:
        program = _PROGRAM.format(path=sys.path, control=control_fd, page=page_fd)
        return subprocess.Popen(
            [sys.executable, "-c", program], stdin=subprocess.DEVNULL, pass_fds=(control_fd, page_fd)
        )

    def _boot(self, num_slots: int, limits: Limits, preload: tuple[str, ...], load_timeout_s: float) -> None:
        self._control.settimeout(load_timeout_s)
        try:
            self._control.sendall(frame(pickle.dumps((num_slots, limits, preload))))
            answer = read_frame(self._control)
        except OSError as error:
            raise RewardError(
                f"the reward workers' parent process did not start within {load_timeout_s:g} s ({error}; importing "
                f"{', '.join(preload) or 'nothing'})"
            ) from error
        if answer is None:
            raise RewardError("the reward workers' parent process died while it started; see its messages above")
        if answer:
            raise RewardError(f"reward workers: {bytes(answer).decode('utf-8', 'replace')}")
        self._control.settimeout(_ANSWER_DEADLINE_S)

    def fileno(self) -> int:
        """Readable exactly when the zygote is gone: it speaks only when asked."""
        return self._control.fileno()

    @property
    def pid(self) -> int:
        return self._process.pid

    def fork(self, slot: int) -> tuple[int, socket.socket]:
        """Fork a worker; its pid and our end of its socket.  Raises OSError when the zygote is gone."""
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                socket.send_fds(self._control, [f"fork {slot}".encode()], [theirs.fileno()])
                pid = int(self._answer())
        except BaseException:
            ours.close()
            raise
        self._children.add(pid)
        ours.setblocking(False)
        return pid, ours

    def kill(self, pid: int) -> None:
        """End a worker, dead or alive; return when it is gone.  Raises OSError when the zygote is gone."""
        self._control.sendall(f"kill {pid}".encode())
        self._answer()
        self._children.discard(pid)

    def _answer(self) -> bytes:
        answer = read_frame(self._control)
        if answer is None:
            raise ConnectionResetError("the reward workers' parent process is gone")
        return bytes(answer)

    def stop(self) -> None:
        """End the zygote, which ends its workers; return when all are gone."""
        self._control.close()
        try:
            self._process.wait(_STOP_DEADLINE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.returncode != 0:
            self._kill_orphans()
        self._children.clear()
        self.progress.close()

    def _kill_orphans(self) -> None:
        for pid in self._children:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)

    def forget(self) -> None:
        """Drop our copies after a fork of this process; the processes belong to the parent."""
        self._control.close()
        self._process.returncode = 0  # not our child: nothing to wait for
