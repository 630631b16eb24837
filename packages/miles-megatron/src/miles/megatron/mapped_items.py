"""Tensors of a ``torch_dist`` file, which ``torch.save`` wrote one after another, as views of the mapped file."""

from __future__ import annotations

import io
import mmap
import os
import struct
import zipfile
from pathlib import Path

import torch
from torch.serialization import skip_data
from typing_extensions import Buffer

_LOCAL_HEADER = 30
"""Bytes of a record of a zip archive before its name, further fields and data."""
_NAME_LENGTH = 26
"""Where the lengths of name and further fields are in them."""


class MappedItems:
    """One file.  Its bytes are read when a value is used, and belong to the page cache, not to this process."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            # Of its own, because torch has no tensors that cannot be written.
            self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)

    def tensor(self, offset: int, length: int) -> torch.Tensor:
        """The tensor that was saved at ``offset``."""
        item = memoryview(self._bytes)[offset : offset + length]
        with skip_data():
            like: torch.Tensor = torch.load(_Window(item), map_location="cpu", weights_only=True)
        count = like.untyped_storage().nbytes() // like.itemsize
        if not count:
            return like
        values = torch.frombuffer(self._bytes, dtype=like.dtype, count=count, offset=offset + _storage_start(item))
        return values.as_strided(like.shape, like.stride(), like.storage_offset())


def _storage_start(item: memoryview) -> int:
    """Where the bytes of the only storage are in the archive that ``torch.save`` made."""
    with zipfile.ZipFile(_Window(item)) as archive:
        (record,) = (record for record in archive.infolist() if record.filename.endswith("/data/0"))
    start: int = record.header_offset
    name: int
    extra: int
    name, extra = struct.unpack_from("<HH", item, start + _NAME_LENGTH)
    return start + _LOCAL_HEADER + name + extra


class _Window(io.RawIOBase):
    """A part of the file as a file."""

    def __init__(self, view: memoryview) -> None:
        self._view = view
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: len(self._view)}[whence]
        return self._at

    def readinto(self, buffer: Buffer) -> int:
        part = self._view[self._at :][: memoryview(buffer).nbytes]
        memoryview(buffer).cast("B")[: len(part)] = part
        self._at += len(part)
        return len(part)
