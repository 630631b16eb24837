"""One weight update: pause, move every bucket, prove, stamp the version, continue."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch

from miles.core.weights.adapter_form import AdapterForm
from miles.core.weights.bucket import Bucket, buckets
from miles.core.weights.delta import ChangeTracker
from miles.core.weights.engine_client import EngineFleet
from miles.core.weights.transport import WeightTransport

PauseMode = Literal["abort", "retract", "in_place"]


@dataclass(slots=True)
class SyncReport:
    """What an update took."""

    timings: dict[str, float] = field(default_factory=dict)
    """Seconds per phase."""
    bytes: int = 0
    """Sent to each engine."""
    whole_bytes: int = 0
    """Of all tensors."""
    names: list[str] = field(default_factory=list)
    """Of all tensors."""
    dtype: torch.dtype = torch.float32
    """Of the last one."""
    probe_difference: float | None = None
    """Nats between trainer and engine on a fixed prompt; None: not asked this time."""

    def metrics(self) -> dict[str, float]:
        """As they are logged."""
        density = self.bytes / self.whole_bytes if self.whole_bytes else 0.0
        found = {"perf/update_weights_wire_bytes": float(self.bytes), "perf/update_weights_density": density}
        if self.probe_difference is not None:
            found["perf/weight_probe_abs_diff"] = self.probe_difference
        return found

    def count(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """The same tensors, their bytes added up on the way."""
        for name, tensor in tensors:
            self.whole_bytes += tensor.nbytes
            self.names.append(name)
            self.dtype = tensor.dtype
            yield name, tensor

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
    tracker: ChangeTracker | None = None,
    adapter: AdapterForm | None = None,
) -> SyncReport:
    """Make every engine of ``fleet`` hold ``named_tensors`` as weight version ``version``.

    With a ``tracker`` only what changed is sent, to engines that all hold the version it remembers.  With the form of
    an ``adapter`` the tensors are its, and engines add it to the model that they were started with.
    A failure leaves the engines paused: half-new weights must never generate.
    """
    report = SyncReport()
    with report.phase("pause"):
        fleet.post("/pause_generation", {"mode": pause_mode})
        if pause_mode != "in_place":
            fleet.post("/flush_cache")
        base = None if tracker is None else _base_version(fleet, tracker)
        opening: dict[str, Any] = {"selector": "all"}
        fleet.post("/begin_weight_update", opening if adapter is None else opening | {"adapter": adapter.to_json()})
    try:
        for bucket in _timed(_outgoing(report.count(named_tensors), bucket_bytes, tracker, base), report):
            with report.phase("send"):
                report.bytes += transport.send(replace(bucket, adapter=adapter), fleet, version)
        with report.phase("commit"):
            transport.commit(fleet, version)
    except BaseException:
        fleet.post_anyway("/end_weight_update")
        raise
    with report.phase("commit"):
        fleet.post("/end_weight_update")
        fleet.post("/update_weight_version", {"new_version": str(version), "abort_all_requests": False})
        fleet.post("/continue_generation")
    if tracker is not None:
        tracker.finish(str(version))
    return report


def _base_version(fleet: EngineFleet, tracker: ChangeTracker) -> str | None:
    """The version that a change can build on; None when an engine holds another one or does not say."""
    held = {fact.get("weight_version") for fact in fleet.get("/model_info")}
    return tracker.version if held == {tracker.version} else None


def _outgoing(
    tensors: Iterable[tuple[str, torch.Tensor]], limit_bytes: int, tracker: ChangeTracker | None, base: str | None
) -> Iterator[Bucket]:
    if tracker is None:
        yield from buckets(tensors, limit_bytes)
    elif base is None:
        yield from buckets(tracker.whole(tensors), limit_bytes)
    else:
        for bucket in buckets(tracker.changes(tensors), limit_bytes):
            change = tracker.describe(base, [slot.name for slot in bucket.slots])
            checksums = {name: tracker.checksums[name] for name in change.entries}
            yield replace(bucket, change=change, whole_checksums=checksums)


def _timed(bucket_stream: Iterator[Bucket], report: SyncReport) -> Iterator[Bucket]:
    while True:
        with report.phase("gather"):
            bucket = next(bucket_stream, None)
        if bucket is None:
            return
        yield bucket
