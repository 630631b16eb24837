"""One weight update: pause, move every bucket, prove, stamp the version, continue."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import torch

from miles.core.weights.bucket import buckets
from miles.core.weights.engine_client import EngineFleet
from miles.core.weights.transport import WeightTransport

PauseMode = Literal["abort", "retract", "in_place"]


@dataclass(slots=True)
class SyncReport:
    """Seconds per phase and bytes sent to each engine."""

    timings: dict[str, float] = field(default_factory=dict)
    bytes: int = 0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.timings[name] = self.timings.get(name, 0.0) + time.perf_counter() - start


def push_weights(
    named_tensors: Iterable[tuple[str, torch.Tensor]],
    fleet: EngineFleet,
    transport: WeightTransport,
    *,
    version: int,
    bucket_bytes: int,
    pause_mode: PauseMode = "retract",
) -> SyncReport:
    """Make every engine of ``fleet`` hold ``named_tensors`` as weight version ``version``.

    A failure leaves the engines paused: half-new weights must never generate.
    """
    report = SyncReport()
    with report.phase("pause"):
        fleet.post("/pause_generation", {"mode": pause_mode})
        if pause_mode != "in_place":
            fleet.post("/flush_cache")
        fleet.post("/begin_weight_update", {"selector": "all"})
    stream = buckets(named_tensors, bucket_bytes)
    while True:
        with report.phase("gather"):
            bucket = next(stream, None)
        if bucket is None:
            break
        with report.phase("send"):
            report.bytes += transport.send(bucket, fleet, version)
    with report.phase("commit"):
        transport.commit(fleet, version)
        fleet.post("/end_weight_update")
        fleet.post("/update_weight_version", {"new_version": str(version), "abort_all_requests": False})
        fleet.post("/continue_generation")
    return report
