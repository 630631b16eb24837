"""What a weight transport is, and the choice of one."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit

from miles.core.errors import ConfigError
from miles.core.registry import Registry
from miles.core.weights.bucket import Bucket
from miles.core.weights.engine_client import EngineClient, EngineFleet
from miles.core.weights.shm import LOAD_FORMAT

TRANSPORTS = Registry("miles.weight_transports")


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
    """The transport ``name``; ``auto`` takes shared memory where every engine can read it, else ``broadcast``.

    ConfigError when the engines cannot take that one.
    """
    if name == "auto":
        name = "shm" if all(_reads_shared_memory(url) for url in urls) else "broadcast"
    elif name == "shm" and (remote := [url for url in urls if not is_here(url)]):
        raise ConfigError(
            f"--update-weight-transport shm: the engines at {', '.join(remote)} are on other machines than the trainer "
            "that sends. Use broadcast, disk (a directory that all of them see), or auto"
        )
    transport: WeightTransport = TRANSPORTS.get(name)(run_dir)
    return transport


def is_here(url: str) -> bool:
    """Whether the host of ``url`` is an address of this machine."""
    host = urlsplit(url).hostname or ""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.bind(address)
    except OSError:
        return False
    return True


def _reads_shared_memory(url: str) -> bool:
    """An engine of this machine that knows the format; SGLang does when Miles has started it."""
    if not is_here(url):
        return False
    facts = EngineClient(url).get("/server_info")
    return facts.get("engine") == "miles-embedded" or LOAD_FORMAT in (facts.get("custom_weight_loader") or ())
