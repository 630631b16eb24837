"""Shared memory: one reused buffer that trainer and engines of this machine both map.

A bucket is copied once by the trainer and once by each engine, all at the same time (``shared_ring``).  Nothing is
serialized but the layout.
"""

from __future__ import annotations

import base64
import mmap
import os
import pickle
import tempfile
from collections.abc import Sequence
from concurrent.futures import Future, wait
from functools import partial
from pathlib import Path
from typing import Any

import torch

from miles.core.errors import WeightSyncError
from miles.core.weights.bucket import Bucket, compare
from miles.core.weights.engine_client import Answer, EngineFleet, held_checksums
from miles.core.weights.shared_ring import LINE_BYTES, RingLayout, RingWriter

SHARED_MEMORY = Path("/dev/shm")
LOAD_FORMAT = "miles_shm"
FOLLOWS = "follows_shared_ring"
"""In an engine's facts: it reads a stream from a ring smaller than the stream."""
RING_BYTES = 8 << 20
"""Stays in the cache that cores share, and leaves each side free to be a few milliseconds late."""


class SharedMemoryTransport:
    """Buckets through one file in ``/dev/shm``.

    It is of ``RING_BYTES`` where all engines follow the trainer, else of the size of a bucket.
    The file is unlinked by ``close``; the name carries the owner's pid so that leftovers of a killed run can be told.
    """

    def __init__(self, run_dir: Path) -> None:
        del run_dir  # the buffer lives in memory
        remove_leftovers(SHARED_MEMORY)
        handle, path = tempfile.mkstemp(prefix=f"miles-{os.getpid()}-", dir=SHARED_MEMORY)
        self._path, self._file = Path(path), handle
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self._follow: dict[tuple[str, ...], bool] = {}
        """Whether these engines do."""

    def send(self, bucket: Bucket, fleet: EngineFleet, version: int) -> int:
        """Copy the bucket in while every engine copies it out; compare checksums."""
        layout = RingLayout(len(fleet.urls), self._ring_bytes(bucket, fleet))
        self._reserve(layout.num_bytes)
        answers: list[Future[Answer]] = []
        writer = RingWriter(self._buffer, layout, partial(_check_under_way, answers))
        requests = [self._request(bucket, layout, reader) for reader in range(layout.num_readers)]
        answers += fleet.post_each("/update_weights_from_tensor", requests)
        try:
            slots = zip(bucket.slots, bucket.tensors, strict=True)
            written = {slot.name: writer.write(slot.offset, tensor) for slot, tensor in slots}
        except BaseException:
            writer.give_up()
            raise
        finally:
            wait(answers)  # none may still be reading when the buffer is filled again
        for url, answer in zip(fleet.urls, answers, strict=True):
            compare(url, bucket.expected(written), held_checksums(answer.result()))
        return bucket.payload_bytes

    def _ring_bytes(self, bucket: Bucket, fleet: EngineFleet) -> int:
        urls = tuple(fleet.urls)
        if urls not in self._follow:
            self._follow[urls] = all(facts.get(FOLLOWS) for facts in fleet.get("/server_info"))
        return max(min(RING_BYTES, bucket.nbytes) if self._follow[urls] else bucket.nbytes, LINE_BYTES)

    def _request(self, bucket: Bucket, ring: RingLayout, reader: int) -> dict[str, Any]:
        """SGLang passes on nothing but ``serialized_named_tensors``, so the layout is there once more."""
        layout: dict[str, Any] = {
            "path": str(self._path),
            "num_readers": ring.num_readers,
            "ring_bytes": ring.ring_bytes,
            "reader": reader,
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
        os.close(self._file)
        self._path.unlink(missing_ok=True)

    def _reserve(self, nbytes: int) -> None:
        if self._buffer.numel() >= nbytes:
            return
        self._buffer = torch.empty(0, dtype=torch.uint8)
        os.posix_fallocate(self._file, 0, nbytes)  # a full /dev/shm is an error here, not a SIGBUS at the first write
        self._buffer = torch.frombuffer(mmap.mmap(self._file, nbytes), dtype=torch.uint8)


def _check_under_way(answers: Sequence[Future[Answer]]) -> None:
    """An engine that has answered reads no more: raise what it says."""
    for answer in answers:
        if answer.done():
            raise WeightSyncError(f"an engine ended the update before it had all of it: {answer.result()}")


def remove_leftovers(directory: Path) -> None:
    """Unlink buffers whose owner is gone (a run that was killed cannot do it itself)."""
    for path in directory.glob("miles-*-*"):
        pid = path.name.split("-")[1]
        if pid.isdigit() and not Path(f"/proc/{pid}").exists():
            path.unlink(missing_ok=True)
