"""The sending side of weight updates: what rank 0 of the trainer keeps from one update to the next."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch

from miles.core.errors import EngineError, WeightSyncError
from miles.core.flags.training import Training
from miles.core.weights.adapter_form import AdapterForm
from miles.core.weights.delta import ChangeTracker, SentWeights
from miles.core.weights.engine_client import EngineFleet
from miles.core.weights.sync import SyncReport, push_weights
from miles.core.weights.transport import WeightTransport, create_transport

VERSIONED_PREFIXES, WEIGHT_DELTA = "miles_versioned_prefixes", "miles_weight_delta"
"""How an SGLang server that Miles has started tells what it can do."""


class WeightSender:
    """``deadline_s`` bounds every answer of an engine; ``remembers``: what was sent can be sent again.

    Used by one thread at a time.
    """

    def __init__(self, flags: Training, run_dir: Path, *, deadline_s: float, remembers: bool = False) -> None:
        self._flags, self._run_dir, self._deadline_s = flags, run_dir, deadline_s
        self._memory = SentWeights() if remembers else None
        self._tracker = ChangeTracker() if flags.update_weight_delta else None
        self._transport: WeightTransport | None = None
        self._fleet: EngineFleet | None = None
        self._adapter: AdapterForm | None = None

    def send(
        self,
        named_tensors: Iterable[tuple[str, torch.Tensor]],
        urls: list[str],
        version: int,
        adapter: AdapterForm | None = None,
    ) -> SyncReport:
        """Bring the engines at ``urls`` to ``version``.

        With ``adapter`` the tensors are those of an adapter of this form, the same one in every update; all of them
        change every time, so that they are sent whole.
        """
        self._adapter = adapter
        remembered = named_tensors if self._memory is None else self._memory.keep(named_tensors)
        return self._push(remembered, urls, version, self._tracker if adapter is None else None)

    def send_again(self, urls: list[str], version: int) -> SyncReport:
        """Bring the engines at ``urls`` to ``version``, which others took with the last ``send``."""
        assert self._memory is not None, "nothing is remembered"
        return self._push(self._memory.tensors.items(), urls, version, None)

    def _push(
        self,
        named_tensors: Iterable[tuple[str, torch.Tensor]],
        urls: list[str],
        version: int,
        tracker: ChangeTracker | None,
    ) -> SyncReport:
        fleet, transport = self._connected(urls)
        return push_weights(
            named_tensors,
            fleet,
            transport,
            version=version,
            bucket_bytes=self._flags.update_weight_buffer_size,
            pause_mode=self._flags.pause_generation_mode,
            tracker=tracker,
            adapter=self._adapter,
        )

    def scramble(self) -> None:
        """Let the engines remember their weights and fill them with noise."""
        assert self._fleet is not None, "send() comes first"
        self._fleet.post("/weights_checker", {"action": "snapshot"})
        self._fleet.post("/weights_checker", {"action": "reset_tensors"})
        if self._tracker is not None:
            self._tracker.version = None

    def compare(self) -> None:
        """WeightSyncError unless another ``send`` has restored every tensor."""
        assert self._fleet is not None, "send() comes first"
        try:
            self._fleet.post("/weights_checker", {"action": "compare"})
        except EngineError as error:
            raise WeightSyncError(
                f"--check-weight-update-equal: an update does not reach every tensor: {error}"
            ) from error

    def close(self) -> None:
        """Free connections, buffers and files.  Safe to call twice."""
        if self._transport is not None:
            self._transport.close()
        if self._fleet is not None:
            self._fleet.close()
        self._transport = self._fleet = None

    def _connected(self, urls: list[str]) -> tuple[EngineFleet, WeightTransport]:
        if self._fleet is None or self._fleet.urls != urls:
            fleet = EngineFleet(urls, deadline_s=self._deadline_s)
            if self._tracker is not None:
                _check_takes_changes(fleet)
            if self._flags.pause_generation_mode == "in_place":
                _check_keeps_prefixes_apart(fleet)
            self.close()  # engines in other places may want another transport
            self._fleet = fleet
        if self._transport is None:
            self._transport = create_transport(self._flags.update_weight_transport, urls, self._run_dir)
        return self._fleet, self._transport


def _check_takes_changes(fleet: EngineFleet) -> None:
    for url, fact in zip(fleet.urls, fleet.get("/server_info"), strict=True):
        if not fact.get("weight_delta") and WEIGHT_DELTA not in (fact.get("custom_weight_loader") or ()):
            raise EngineError(
                f"--update-weight-delta: the engine at {url} takes whole tensors only. Leave the flag out"
            )


def _check_keeps_prefixes_apart(fleet: EngineFleet) -> None:
    """What old weights computed must not be the beginning of a response of new ones."""
    for url, fact in zip(fleet.urls, fleet.get("/server_info"), strict=True):
        own = fact.get("engine") == "miles-embedded" or VERSIONED_PREFIXES in (fact.get("custom_weight_loader") or ())
        if not own and not fact.get("disable_radix_cache"):
            raise EngineError(
                f"--pause-generation-mode in_place: the engine at {url} would use prefixes that old weights computed. "
                "Start it with --disable-radix-cache, or use --pause-generation-mode retract"
            )
