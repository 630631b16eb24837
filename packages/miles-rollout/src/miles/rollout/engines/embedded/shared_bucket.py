"""Tensors that a trainer streams through shared memory."""

from __future__ import annotations

import mmap
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from miles.core.errors import EngineError
from miles.core.weights.shared_ring import Incoming, RingLayout, RingReader
from miles.rollout.engines.embedded.protocol import BadRequest
from miles.rollout.engines.embedded.weights import WeightError, parse_dtype


@dataclass(frozen=True, slots=True)
class BucketTensor:
    """Where one tensor lies in the stream."""

    name: str
    dtype: torch.dtype
    shape: torch.Size
    offset: int

    @classmethod
    def parse(cls, entry: Mapping[str, Any]) -> BucketTensor:
        """From the wire; raise WeightError when something is missing or unknown."""
        try:
            dtype = parse_dtype(entry["dtype"])
            return cls(str(entry["name"]), dtype, torch.Size(entry["shape"]), int(entry["offset"]))
        except (KeyError, TypeError, ValueError) as error:
            raise WeightError(
                f"a tensor of the bucket needs name, dtype, shape and offset; got {dict(entry)!r}"
            ) from error


@dataclass(frozen=True, slots=True)
class SharedBucket:
    """A stream as its sender describes it."""

    path: str
    layout: RingLayout
    reader: int
    tensors: list[BucketTensor]

    @classmethod
    def parse(cls, value: Any) -> SharedBucket:
        """From the wire; raise BadRequest or WeightError when something is missing or unknown."""
        try:
            layout, reader = RingLayout(int(value["num_readers"]), int(value["ring_bytes"])), int(value["reader"])
            path, entries = str(value["path"]), list(value["tensors"])
        except (KeyError, TypeError, ValueError) as error:
            raise BadRequest(
                f"bucket must be an object with path, num_readers, ring_bytes, reader and tensors ({error!r})"
            ) from error
        if layout.ring_bytes < 1 or not 0 <= reader < layout.num_readers:
            raise BadRequest(f"bucket: reader {reader} of {layout.num_readers}, a ring of {layout.ring_bytes} bytes")
        return cls(path, layout, reader, [BucketTensor.parse(entry) for entry in entries])


class SharedMemory:
    """Keeps the mapping of the last file: to map pages anew costs more than to copy them."""

    def __init__(self) -> None:
        self._identity: tuple[int, int, int] | None = None
        self._bytes = torch.empty(0, dtype=torch.uint8)

    def incoming(self, bucket: SharedBucket) -> list[tuple[str, Incoming]]:
        """The tensors by name, in the order of the stream.  EngineError when the file is missing or too short."""
        reader = RingReader(self._mapped(bucket.path, bucket.layout.num_bytes), bucket.layout, bucket.reader)
        return [(it.name, Incoming(reader, it.offset, it.dtype, it.shape)) for it in bucket.tensors]

    def _mapped(self, path: str, num_bytes: int) -> torch.Tensor:
        try:
            descriptor = os.open(path, os.O_RDWR)
        except OSError as error:
            raise EngineError(f"cannot open the bucket {path}: {error.strerror}") from error
        try:
            found = os.fstat(descriptor)
            if found.st_size < num_bytes:
                raise EngineError(f"the bucket {path} is shorter than its {num_bytes} bytes")
            identity = (found.st_dev, found.st_ino, found.st_size)
            if identity != self._identity:
                pages = mmap.mmap(descriptor, found.st_size, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
                self._bytes, self._identity = torch.frombuffer(pages, dtype=torch.uint8), identity
        finally:
            os.close(descriptor)
        return self._bytes
