"""Shared memory: one reused buffer that trainer and engines of this machine both map.

A bucket is copied once by the trainer and once by each engine, piece by piece, so that engines copy one piece while the
trainer copies the next.  Nothing is serialized but the layout.
"""

from __future__ import annotations

import base64
import mmap
import os
import pickle
import tempfile
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch

from miles.core.weights.bucket import Bucket, compare
from miles.core.weights.engine_client import Answer, EngineFleet, held_checksums

SHARED_MEMORY = Path("/dev/shm")
LOAD_FORMAT = "miles_shm"
PIECE_BYTES = 8 << 20
"""At least: a request of a millisecond is little beside copying this much."""
NUM_PIECES = 6
"""Of a large bucket: the time of one piece is not shared."""


class SharedMemoryTransport:
    """Buckets through one file in ``/dev/shm``.

    The file is unlinked by ``close``; the name carries the owner's pid so that leftovers of a killed run can be told.
    """

    def __init__(self, run_dir: Path) -> None:
        del run_dir  # the buffer lives in memory
        remove_leftovers(SHARED_MEMORY)
        handle, path = tempfile.mkstemp(prefix=f"miles-{os.getpid()}-", dir=SHARED_MEMORY)
        self._path, self._file = Path(path), handle
        self._map: mmap.mmap | None = None
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def send(self, bucket: Bucket, fleet: EngineFleet, version: int) -> int:
        """Copy the bucket in, let every engine copy it out, compare checksums."""
        self._reserve(bucket.nbytes)
        under_way: list[tuple[dict[str, str], list[Future[Answer]]]] = []
        for piece in bucket.pieces(max(PIECE_BYTES, bucket.nbytes // NUM_PIECES)):
            expected = piece.copy_into(self._buffer)
            request = self._describe(piece)
            under_way.append((expected, fleet.post_each("/update_weights_from_tensor", [request] * len(fleet.urls))))
        for expected, answers in under_way:
            for url, answer in zip(fleet.urls, answers, strict=True):
                compare(url, expected, held_checksums(answer.result()))
        return bucket.payload_bytes

    def _describe(self, bucket: Bucket) -> dict[str, Any]:
        """The request.  SGLang passes on nothing but ``serialized_named_tensors``, so the layout is there once more."""
        layout: dict[str, Any] = {
            "path": str(self._path),
            "nbytes": bucket.nbytes,
            "tensors": [slot.to_json() for slot in bucket.slots],
        }
        if bucket.adapter is not None:
            layout["adapter"] = bucket.adapter.to_json()
        layout |= bucket.request_fields()
        return {
            "load_format": LOAD_FORMAT,
            "bucket": layout,
            "serialized_named_tensors": [base64.b64encode(pickle.dumps(layout)).decode()],
            "flush_cache": False,
            **bucket.request_fields(),
        }

    def commit(self, fleet: EngineFleet, version: int) -> None:
        """Nothing is held back."""

    def close(self) -> None:
        """Unmap and unlink the buffer."""
        self._buffer = torch.empty(0, dtype=torch.uint8)
        if self._map is not None:
            self._map.close()
            self._map = None
        os.close(self._file)
        self._path.unlink(missing_ok=True)

    def _reserve(self, nbytes: int) -> None:
        if self._buffer.numel() >= nbytes:
            return
        self._buffer = torch.empty(0, dtype=torch.uint8)
        if self._map is not None:
            self._map.close()
        os.posix_fallocate(self._file, 0, nbytes)  # a full /dev/shm is an error here, not a SIGBUS at the first write
        self._map = mmap.mmap(self._file, nbytes)
        self._buffer = torch.frombuffer(self._map, dtype=torch.uint8)


def remove_leftovers(directory: Path) -> None:
    """Unlink buffers whose owner is gone (a run that was killed cannot do it itself)."""
    for path in directory.glob("miles-*-*"):
        pid = path.name.split("-")[1]
        if pid.isdigit() and not Path(f"/proc/{pid}").exists():
            path.unlink(missing_ok=True)
