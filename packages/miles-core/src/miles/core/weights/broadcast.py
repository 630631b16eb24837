"""A process group of the trainer and the engines: gloo among hosts, NCCL among accelerators.

No step can hang: an engine that refuses ends it at once, and one that is silent at the deadline.
"""

from __future__ import annotations

import itertools
import json
import os
import socket
import time
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch

from miles.core.errors import EngineError
from miles.core.weights import group as groups
from miles.core.weights.bucket import Bucket, compare
from miles.core.weights.checksum import checksum
from miles.core.weights.engine_client import Answer, EngineFleet, held_checksums

CHANGES_FORMAT = "miles_changes:"
DEADLINE_S = 300.0
_CALL_DEADLINE_S = 5.0
_POLL_S = 0.0005
_numbers = itertools.count()
_unfinished: list[_Link] = []
"""Links with operations that not everybody took part in.  To free such a group is to wait, with the whole interpreter,
until the other side closes its connections, so they are kept until the process ends."""


class BroadcastTransport:
    """Tensors one after another to all engines at the same time, by ``/update_weights_from_distributed``."""

    def __init__(self, run_dir: Path) -> None:
        del run_dir  # nothing is written
        self._link: _Link | None = None

    def send(self, bucket: Bucket, fleet: EngineFleet, version: int) -> int:
        """Broadcast the bucket's tensors; compare checksums with engines that report them."""
        link = self._linked(fleet, on_accelerator=bucket.tensors[0].is_cuda)
        tensors = [link.prepare(tensor) for tensor in bucket.tensors]
        request = {
            "names": [slot.name for slot in bucket.slots],
            "dtypes": [slot.dtype for slot in bucket.slots],
            "shapes": [list(slot.shape) for slot in bucket.slots],
            "group_name": link.name,
            "flush_cache": False,
            **bucket.request_fields(),
        }
        if bucket.change is not None:  # SGLang passes on nothing else
            request["load_format"] = CHANGES_FORMAT + json.dumps(bucket.change.to_json())
        try:
            answers = link.broadcast(fleet, request, tensors)
        except EngineError:
            _unfinished.append(link)
            self._drop()
            raise
        held = {url: held_checksums(answer) for url, answer in zip(fleet.urls, answers, strict=True)}
        sent = _checksums(bucket, tensors) if any(held.values()) else {}
        for url, checksums in held.items():
            if checksums:
                compare(url, sent, checksums)
        return bucket.payload_bytes

    def commit(self, fleet: EngineFleet, version: int) -> None:
        """Nothing is held back."""

    def close(self) -> None:
        self._drop()

    def _linked(self, fleet: EngineFleet, *, on_accelerator: bool) -> _Link:
        if self._link is None or self._link.urls != fleet.urls:
            self._drop()
            self._link = _Link.open(fleet, on_accelerator=on_accelerator)
        return self._link

    def _drop(self) -> None:
        if self._link is not None:
            self._link.close()
            self._link = None


class _Link:
    """An open group, and who is in it."""

    def __init__(self, urls: list[str], name: str, store: Any, group: Any, *, on_accelerator: bool) -> None:
        self.urls, self.name = urls, name
        self._store, self._group = store, group
        self._on_accelerator = on_accelerator

    @classmethod
    def open(cls, fleet: EngineFleet, *, on_accelerator: bool) -> _Link:
        """Make the group with every rank of every engine; EngineError when one refuses or does not come."""
        facts = fleet.get("/server_info")
        sizes = [int(fact.get("tp_size") or 1) for fact in facts]
        nccl = on_accelerator and all(str(fact.get("device", "cpu")).startswith("cuda") for fact in facts)
        name = f"miles-weights-{os.getpid()}-{next(_numbers)}"
        world_size = 1 + sum(sizes)
        host = _own_address(fleet.urls)
        store = groups.open_store(host, world_size, DEADLINE_S)
        backend = "nccl" if nccl else "gloo"
        offsets = itertools.accumulate(sizes, initial=1)
        answers = fleet.post_each(
            "/init_weights_update_group",
            [
                {
                    "master_address": host,
                    "master_port": store.port,
                    "rank_offset": offset,
                    "world_size": world_size,
                    "group_name": name,
                    "backend": backend,
                }
                for offset, _ in zip(offsets, sizes, strict=False)
            ],
        )
        if not nccl:
            arrivals = [_Arrival(store, name, rank) for rank in range(1, world_size)]
            try:
                _wait_for(arrivals, answers)
            except EngineError:
                arrivals.clear()
                del store  # without it those who have come give up
                raise
        group = groups.join(
            store, name=name, rank=groups.SENDER, world_size=world_size, backend=backend, timeout_s=DEADLINE_S
        )
        link = cls(fleet.urls, name, store, group, on_accelerator=nccl)
        try:
            for answer in answers:
                answer.result()  # an engine that has just joined may not know the group by its name yet
        except EngineError:
            link.close()
            raise
        return link

    def prepare(self, tensor: torch.Tensor) -> torch.Tensor:
        """Where the group can send it from."""
        return (tensor if self._on_accelerator else tensor.cpu()).contiguous()

    def broadcast(self, fleet: EngineFleet, request: Answer, tensors: Sequence[torch.Tensor]) -> list[Answer]:
        answers = fleet.post_each("/update_weights_from_distributed", [request] * len(self.urls))
        works = [_Work(groups.broadcast(self._group, tensor)) for tensor in tensors]
        _wait_for(works, answers)
        try:
            for work in works:
                work.result()
        except RuntimeError as error:
            raise EngineError(f"the broadcast of weights failed: {error}") from error
        return [answer.result() for answer in answers]

    def close(self) -> None:
        """Let the engines leave, and leave."""
        fleet = EngineFleet(self.urls, deadline_s=_CALL_DEADLINE_S)
        fleet.post_anyway("/destroy_weights_update_group", {"group_name": self.name})
        fleet.close()
        if self not in _unfinished:
            groups.leave(self._group)


class _Arrival:
    """A member of the group that is to come."""

    def __init__(self, store: Any, name: str, rank: int) -> None:
        self._store, self._name, self._rank = store, name, rank

    def done(self) -> bool:
        return groups.has_arrived(self._store, name=self._name, rank=self._rank)


class _Work:
    """A collective operation, asked like a future."""

    def __init__(self, work: Any) -> None:
        self._work = work

    def done(self) -> bool:
        return bool(self._work.is_completed())

    def result(self) -> None:
        self._work.wait()


def _wait_for(own: Sequence[_Arrival | _Work], answers: Sequence[Future[Answer]]) -> None:
    """Return when this side is done; EngineError as soon as an engine refuses, or at the deadline."""
    deadline = time.monotonic() + DEADLINE_S
    while not all(part.done() for part in own):
        for answer in answers:
            if answer.done():
                answer.result()
        if time.monotonic() > deadline:
            raise EngineError(f"engines did not take weights from the group within {DEADLINE_S:.0f} s")
        time.sleep(_POLL_S)


def _own_address(urls: Sequence[str]) -> str:
    """Where engines reach this machine: the address that it has on the way to the first of them."""
    parts = urlsplit(urls[0])
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((parts.hostname or "127.0.0.1", parts.port or 80))
        return str(probe.getsockname()[0])


def _checksums(bucket: Bucket, tensors: Sequence[torch.Tensor]) -> dict[str, str]:
    named = zip(bucket.slots, tensors, strict=True)
    return {slot.name: bucket.whole_checksums.get(slot.name) or checksum(tensor) for slot, tensor in named}
