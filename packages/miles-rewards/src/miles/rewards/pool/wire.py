"""Frames on a stream socket: a length of 8 bytes, then as many bytes."""

from __future__ import annotations

import socket
import struct
from collections import deque

_LENGTH = struct.Struct("!Q")
_CHUNK = 1 << 18
_KEPT_BYTES = 4 << 20

MAX_REPLY_BYTES = 64 << 20
"""A worker has handled untrusted text: more than this at once is not an answer."""


def frame(payload: bytes) -> bytes:
    """``payload`` with its length in front."""
    return _LENGTH.pack(len(payload)) + payload


def read_frame(sock: socket.socket) -> memoryview | None:
    """The next frame of a blocking socket; None when the other side is gone."""
    head = _read_exactly(sock, _LENGTH.size)
    return None if head is None else _read_exactly(sock, _LENGTH.unpack(head)[0])


def _read_exactly(sock: socket.socket, size: int) -> memoryview | None:
    whole = memoryview(bytearray(size))
    return whole if _fill(whole, sock) else None


def _fill(space: memoryview, sock: socket.socket) -> bool:
    """Read as much as fits; whether the other side was there until then."""
    while space:
        received = sock.recv_into(space)
        if not received:
            return False
        space = space[received:]
    return True


class ReusedSpace:
    """Reads the frames of a blocking socket to one place: fresh memory costs more than the bytes that go there."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._space = memoryview(bytearray(_KEPT_BYTES))

    def read(self) -> memoryview | None:
        """The next frame, which the one after it overwrites; None when the other side is gone."""
        head = self._space[: _LENGTH.size]
        if not _fill(head, self._sock):
            return None
        size = _LENGTH.unpack(head)[0]
        space = self._space[:size] if size <= _KEPT_BYTES else memoryview(bytearray(size))
        return space if _fill(space, self._sock) else None


class FrameReader:
    """Collects the frames of a non-blocking socket."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._buffer = bytearray()

    def read(self) -> tuple[list[bytes], bool]:
        """Complete frames that have arrived, and whether the other side is still there and makes sense.

        It does not when a frame is longer than any honest answer.
        """
        open_ = self._receive()
        frames: list[bytes] = []
        while len(self._buffer) >= _LENGTH.size:
            size = _LENGTH.unpack_from(self._buffer)[0]
            if size > MAX_REPLY_BYTES:
                return frames, False
            end = _LENGTH.size + size
            if len(self._buffer) < end:
                break
            frames.append(bytes(self._buffer[_LENGTH.size : end]))
            del self._buffer[:end]
        return frames, open_

    def _receive(self) -> bool:
        while len(self._buffer) <= MAX_REPLY_BYTES:
            try:
                chunk = self._sock.recv(_CHUNK)
            except BlockingIOError:
                return True
            except OSError:
                return False
            if not chunk:
                return False
            self._buffer += chunk
            if len(chunk) < _CHUNK:
                return True
        return True


class FrameWriter:
    """Sends frames on a non-blocking socket, keeping what does not fit yet."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._rest: deque[memoryview] = deque()

    def send(self, *pieces: bytes | memoryview) -> bool:
        """Start sending ``pieces`` as one frame; whether everything is out.  The previous frame must be."""
        self._rest.extend(map(memoryview, (_LENGTH.pack(sum(map(len, pieces))) + pieces[0], *pieces[1:])))
        return self.flush()

    def flush(self) -> bool:
        """Send on; whether everything is out.  Raises OSError when the other side is gone."""
        while self._rest:
            piece = self._rest[0]
            try:
                sent = self._sock.send(piece)
            except BlockingIOError:
                return False
            if sent == len(piece):
                self._rest.popleft()
            else:
                self._rest[0] = piece[sent:]
        return True
