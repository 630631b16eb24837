"""Tensors of a ``torch_dist`` file, which ``torch.save`` wrote one after another, as views of the mapped file."""

from __future__ import annotations

import io
import mmap
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.serialization import skip_data
from typing_extensions import Buffer

from miles.megatron.archives import values_header, values_start


@dataclass(frozen=True, slots=True)
class _Kind:
    """What is the same in the archives of all tensors of a dtype, a shape and strides."""

    head: bytes
    """All before the record of the values."""
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]
    storage_offset: int
    count: int
    """Values of the storage."""


class MappedItems:
    """One file.  Its bytes are read when a value is used, and belong to the page cache, not to this process."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            # Of its own, because torch has no tensors that cannot be written.
            self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        self._kinds: dict[int, list[_Kind]] = {}

    def tensor(self, offset: int, length: int) -> torch.Tensor:
        """The tensor that was saved at ``offset``."""
        item = memoryview(self._bytes)[offset : offset + length]
        kind = self._kind(item)
        if not kind.count:
            return torch.empty(kind.shape, dtype=kind.dtype)
        start = offset + values_start(item, len(kind.head))
        values = torch.frombuffer(self._bytes, dtype=kind.dtype, count=kind.count, offset=start)
        return values.as_strided(kind.shape, kind.stride, kind.storage_offset)

    def _kind(self, item: memoryview) -> _Kind:
        """That of an archive, which is taken apart only when it is the first of its kind."""
        known = self._kinds.setdefault(len(item), [])
        for kind in known:
            if bytes(item[: len(kind.head)]) == kind.head:
                return kind
        known.append(_kind_of(item))
        return known[-1]


def _kind_of(item: memoryview) -> _Kind:
    with skip_data():
        like: torch.Tensor = torch.load(_Window(item), map_location="cpu", weights_only=True)
    return _Kind(
        head=bytes(item[: values_header(_Window(item))]),
        dtype=like.dtype,
        shape=like.shape,
        stride=like.stride(),
        storage_offset=like.storage_offset(),
        count=like.untyped_storage().nbytes() // like.itemsize,
    )


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
