"""What a weight transport is, and the choice of one."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit

from miles.core.registry import Registry
from miles.core.weights.bucket import Bucket
from miles.core.weights.engine_client import EngineFleet

TRANSPORTS = Registry("miles.weight_transports")
LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})


class WeightTransport(Protocol):
    """Moves buckets to engines.  Constructed with the run directory; used by one thread."""

    def __init__(self, run_dir: Path) -> None: ...

    def send(self, bucket: Bucket, fleet: EngineFleet, version: int) -> int:
        """Return when every engine holds the bucket; WeightSyncError when one holds something else.

        Returns the number of bytes moved to each engine.
        """

    def commit(self, fleet: EngineFleet, version: int) -> None:
        """Called after the last bucket of a version."""

    def close(self) -> None:
        """Free buffers and files."""


def create_transport(name: str, urls: list[str], run_dir: Path) -> WeightTransport:
    """The transport ``name``; ``auto`` takes shared memory when every engine is on this machine, else the disk."""
    if name == "auto":
        local = all(urlsplit(url).hostname in LOOPBACK for url in urls)
        name = "shm" if local else "disk"
    transport: WeightTransport = TRANSPORTS.get(name)(run_dir)
    return transport
