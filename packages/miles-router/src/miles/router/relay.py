"""Long answers go from the worker's socket to the client's inside the kernel: no byte of them is copied to here.

Linux only (splice), and only between plain sockets; elsewhere everything is read and written as usual.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from miles.router.upstream import UpstreamConnection

RELAY_BYTES = 128 * 1024
"""What must be left of an answer to be worth it."""

_LAST_BYTES = 1
"""Left for the transport, so that whatever a worker sends beyond its answer is seen with it, not by the next one."""

_PIPE_BYTES = 1024 * 1024  # the most that an unprivileged process may ask for


class TargetLostError(Exception):
    """The client's connection failed; what it did not take is gone."""


class KernelPipe:
    """Carries bytes between sockets; empty between calls, so that one serves all connections."""

    def __init__(self) -> None:
        self._outlet, self._inlet = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        with contextlib.suppress(OSError):  # beyond the user's quota; the usual size does as well
            fcntl.fcntl(self._inlet, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)

    def close(self) -> None:
        """Give the descriptors back."""
        os.close(self._outlet)
        os.close(self._inlet)

    def move(self, source: int, target: int, limit: int) -> tuple[int, bytes]:
        """Move up to ``limit`` bytes; how many left ``source``, and the last of them, for which ``target`` had no room.

        0 at the end of ``source``.  Raises BlockingIOError when nothing is there, OSError when ``source`` failed,
        TargetLostError when ``target`` did.
        """
        taken = os.splice(source, self._inlet, min(limit, _PIPE_BYTES), flags=os.SPLICE_F_NONBLOCK | os.SPLICE_F_MOVE)
        left = taken
        try:
            while left:
                left -= os.splice(self._outlet, target, left, flags=os.SPLICE_F_NONBLOCK | os.SPLICE_F_MOVE)
        except BlockingIOError:
            return taken, self._read(left)
        except OSError as error:
            self._read(left)
            raise TargetLostError(str(error)) from None
        return taken, b""

    def _read(self, count: int) -> bytes:
        pieces = []
        while count:
            pieces.append(os.read(self._outlet, count))
            count -= len(pieces[-1])
        return b"".join(pieces)


def can_relay(transport: asyncio.Transport) -> bool:
    """Whether the bytes of a connection are those on its socket."""
    return hasattr(os, "splice") and transport.get_extra_info("sslcontext") is None


class Relay:
    """Takes over from ``connection``'s transport until the answer ends, or the client is slower than the worker.

    Has descriptors of its own: those of a transport could be another connection's by the time they are used.
    """

    def __init__(self, pipe: KernelPipe, target: asyncio.Transport, connection: UpstreamConnection) -> None:
        self._pipe = pipe
        self._connection = connection
        self._target = target
        self._loop = asyncio.get_running_loop()
        self._watching = False
        self._source_fd = os.dup(connection.transport.get_extra_info("socket").fileno())
        self._target_fd = os.dup(target.get_extra_info("socket").fileno())
        connection.transport.pause_reading()

    def stop(self) -> None:
        """Touch the sockets no more."""
        if self._watching:
            self._loop.remove_reader(self._source_fd)
        os.close(self._source_fd)
        os.close(self._target_fd)

    def move(self) -> None:
        """Move what is there; the rest follows as it comes."""
        connection = self._connection
        if self._target.get_write_buffer_size():  # the client is slow: the transports know how to wait
            connection.end_relay(0, b"")
            return
        limit = connection.left - _LAST_BYTES
        try:
            moved, rest = self._pipe.move(self._source_fd, self._target_fd, limit)
        except BlockingIOError:
            self._watch()
        except TargetLostError:
            self._target.abort()
            connection.end_relay(0, b"")
        except OSError:  # the transport will see the same
            connection.end_relay(0, b"")
        else:
            if rest or not moved or moved == limit:
                connection.end_relay(moved, rest)
            else:
                connection.left -= moved
                self._watch()

    def _watch(self) -> None:
        if not self._watching:
            self._watching = True
            self._loop.add_reader(self._source_fd, self.move)
