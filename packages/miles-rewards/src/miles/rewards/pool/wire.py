"""Frames on a stream socket: a length of 8 bytes, then as many bytes."""

from __future__ import annotations

import socket
import struct

_LENGTH = struct.Struct("!Q")
_CHUNK = 1 << 18

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
    whole = space = memoryview(bytearray(size))
    while space:
        received = sock.recv_into(space)
        if not received:
            return None
        space = space[received:]
    return whole


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
        self._rest = memoryview(b"")

    def send(self, payload: bytes) -> bool:
        """Start sending ``payload``; whether everything is out.  The previous frame must be."""
        self._rest = memoryview(frame(payload))
        return self.flush()

    def flush(self) -> bool:
        """Send on; whether everything is out.  Raises OSError when the other side is gone."""
        while self._rest:
            try:
                self._rest = self._rest[self._sock.send(self._rest) :]
            except BlockingIOError:
                return False
        return True
