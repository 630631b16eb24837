"""The endpoints that change weights, without HTTP.  What touches the model runs on the model thread."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from miles.core.weights.adapter_form import AdapterForm
from miles.core.weights.delta import Change
from miles.rollout.engines.embedded.adapters import Adapters
from miles.rollout.engines.embedded.checker import WeightsChecker
from miles.rollout.engines.embedded.protocol import BadRequest
from miles.rollout.engines.embedded.runner import Runner
from miles.rollout.engines.embedded.scheduler import Scheduler
from miles.rollout.engines.embedded.shared_bucket import SharedBucket, SharedMemory
from miles.rollout.engines.embedded.weight_group import WeightGroups
from miles.rollout.engines.embedded.weights import WeightError, WeightStore

SHM_FORMAT = "miles_shm"
Checksums = dict[str, str]


class WeightUpdates:
    """``model_path`` is the directory that the weights came from last."""

    def __init__(self, runner: Runner, weights: WeightStore, adapters: Adapters, model_path: str) -> None:
        self._runner, self._weights, self._adapters = runner, weights, adapters
        self._checker = WeightsChecker(weights)
        self._groups = WeightGroups()
        self._memory = SharedMemory()
        self.model_path = model_path

    def begin(self, body: dict[str, Any]) -> Future[None]:
        """``/begin_weight_update``: from here to the end nothing is computed.

        With ``adapter`` it brings the tensors of an adapter of that form; without it whole weights, which end one.
        """
        form = _adapter_form(body)

        def begin(scheduler: Scheduler) -> None:
            if scheduler.updating:
                raise WeightError("a weight update is already open; call /end_weight_update first")
            self._adapters.expect(form)
            scheduler.updating = True

        return self._runner.call(begin)

    def end(self) -> Future[None]:
        """``/end_weight_update``"""

        def end(scheduler: Scheduler) -> None:
            if not scheduler.updating:
                raise WeightError("no weight update is open; call /begin_weight_update first")
            scheduler.updating = False

        return self._runner.call(end)

    def from_tensor(self, body: dict[str, Any]) -> Future[Checksums]:
        """``/update_weights_from_tensor``; returns the checksums of what is held now."""
        if body.get("load_format") != SHM_FORMAT:
            raise BadRequest(f"load_format is {body.get('load_format')!r}; the embedded engine takes {SHM_FORMAT!r}")
        bucket, change = SharedBucket.parse(body.get("bucket")), _change(body)
        return self._update(body, change, lambda: self._weights.take(self._memory.incoming(bucket), change))

    async def join_group(self, body: dict[str, Any]) -> None:
        """``/init_weights_update_group``"""
        await asyncio.to_thread(self._groups.join, body)

    async def leave_group(self, body: dict[str, Any]) -> None:
        """``/destroy_weights_update_group``"""
        await asyncio.to_thread(self._groups.leave, body)

    def from_distributed(self, body: dict[str, Any]) -> Future[Checksums]:
        """``/update_weights_from_distributed``; what cannot be held is refused before the broadcast begins."""
        announced, change = self._groups.announced(body), _change(body)
        name = str(body.get("group_name"))

        def receive() -> Checksums:
            self._weights.check([(tensor, shape) for tensor, _, shape in announced], change)
            return self._weights.take(self._groups.receive(name, announced), change)

        return self._update(body, change, receive)

    def from_disk(self, body: dict[str, Any]) -> Future[Checksums]:
        """``/update_weights_from_disk``"""
        path = body.get("model_path")
        if not isinstance(path, str):
            raise BadRequest(f"model_path is {path!r}; it must be a directory with safetensors")
        if body.get("load_format") not in (None, "auto", "safetensors"):
            raise BadRequest(f"load_format is {body['load_format']!r}; the embedded engine reads 'safetensors'")
        change = _change(body)

        def load() -> Checksums:
            if change is not None:
                return self._weights.take_files(Path(path), change)
            self.model_path = path
            return self._weights.checksums(self._weights.load_directory(Path(path)))

        return self._update(body, change, load, alone=True)

    def set_version(self, body: dict[str, Any]) -> Future[None]:
        """``/update_weight_version``"""
        version = body.get("new_version")
        if not isinstance(version, str):
            raise BadRequest(f"new_version is {version!r}; it must be a string")

        def change(scheduler: Scheduler) -> None:
            if body.get("abort_all_requests", True):
                scheduler.abort(lambda _: True)
            scheduler.set_version(version)

        return self._runner.call(change)

    def by_name(self, name: Any, truncate_size: int) -> Future[list[Any]]:
        """First rows of a tensor."""
        if not isinstance(name, str):
            raise BadRequest(f"name is {name!r}; it must be a tensor's name")
        return self._runner.call(lambda _: self._weights.read(name)[:truncate_size].float().tolist())

    def check(self, action: str) -> Future[dict[str, Any]]:
        """``/weights_checker``"""
        return self._runner.call(lambda _: self._checker.run(action))

    def _update(
        self, body: dict[str, Any], change: Change | None, load: Callable[[], Checksums], *, alone: bool = False
    ) -> Future[Checksums]:
        """``alone``: it is a whole update, which needs no begin and end."""

        def update(scheduler: Scheduler) -> Checksums:
            if not scheduler.updating and not alone:
                raise WeightError("no weight update is open; call /begin_weight_update first")
            if change is not None and change.base_version != scheduler.version:
                raise WeightError(f"these are changes of version {change.base_version}; {scheduler.version} is held")
            if body.get("abort_all_requests"):
                scheduler.abort(lambda _: True)
            if not scheduler.updating:
                self._adapters.expect(None)
            checksums = load()
            scheduler.weights_changed()
            if body.get("weight_version") is not None:
                scheduler.set_version(str(body["weight_version"]))
            return checksums

        return self._runner.call(update)


def _adapter_form(body: dict[str, Any]) -> AdapterForm | None:
    if body.get("adapter") is None:
        return None
    try:
        return AdapterForm.of_json(body["adapter"])
    except (KeyError, TypeError, ValueError) as error:
        raise BadRequest(f"adapter must have rank, alpha and layers ({error!r})") from error


def _change(body: dict[str, Any]) -> Change | None:
    if body.get("delta") is None:
        return None
    try:
        return Change.of_json(body["delta"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BadRequest(f"delta must have base_version and tensors with dtype and count ({error!r})") from error
