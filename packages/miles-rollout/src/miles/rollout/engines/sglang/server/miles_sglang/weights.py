# mypy: disable-error-code="import-not-found,misc,no-untyped-call"
"""Weights from shared memory: the ``load_format`` of Miles' ``shm`` transport, and the proof that they arrived.

A bucket is ``{"path", "nbytes", "tensors": [{"name", "dtype", "shape", "offset"}]}``.  SGLang's models lay weights out
anew and skip names that they do not know, so every copy that a model makes out of the bucket is watched: what it did
not take, or does not hold afterwards, is not confirmed.
"""

from __future__ import annotations

import json
import zlib
from collections import defaultdict
from collections.abc import Iterator
from functools import wraps
from typing import Any

import torch
from sglang.srt.distributed.parallel_state import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from sglang.srt.managers.tp_worker import BaseTpWorker
from sglang.srt.model_executor.model_runner_components.weight_updater import WeightUpdater
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

LOAD_FORMAT = "miles_shm"


def install() -> None:
    """Teach SGLang the format."""
    WeightUpdater.update_weights_from_tensor = _or_from_bucket(WeightUpdater.update_weights_from_tensor)
    BaseTpWorker.deserialize_own_rank = _or_the_only_one(BaseTpWorker.deserialize_own_rank)


def _or_the_only_one(deserialize: Any) -> Any:
    """A bucket's description is the same for every rank, so it is sent once."""

    @wraps(deserialize)
    def own_rank(self: Any, payloads: list[bytes]) -> Any:
        ranks = get_tensor_model_parallel_world_size()
        return deserialize(self, payloads * ranks if len(payloads) == 1 else payloads)

    return own_rank


def _or_from_bucket(update: Any) -> Any:
    @wraps(update)
    def update_weights(self: Any, named_tensors: Any, load_format: str | None = None) -> tuple[bool, str]:
        if load_format != LOAD_FORMAT:
            answer: tuple[bool, str] = update(self, named_tensors=named_tensors, load_format=load_format)
            return answer
        try:
            return True, json.dumps({"checksums": load_bucket(self.get_model(), named_tensors, self.device)})
        except Exception as error:
            if get_tensor_model_parallel_rank():  # the first rank alone answers; what another one misses must not pass
                raise
            return False, f"{type(error).__name__}: {error}"

    return update_weights


def load_bucket(model: Any, bucket: dict[str, Any], device: str) -> dict[str, str]:
    """Load the tensors; return CRC-32 of those that the model holds now, as eight hex digits."""
    shared = torch.from_file(bucket["path"], shared=False, size=bucket["nbytes"], dtype=torch.uint8)
    watch = CopyWatch(shared.to(device), bucket["tensors"])
    with torch.no_grad(), watch:
        model.load_weights(list(watch.tensors()))
    home = watch.memory.untyped_storage().data_ptr()
    if any(tensor.untyped_storage().data_ptr() == home for tensor in (*model.parameters(), *model.buffers())):
        raise RuntimeError("the model kept a view of the shared memory instead of a copy")
    data = memoryview(shared.numpy())
    held = watch.held(whole=get_tensor_model_parallel_world_size() == 1)
    return {name: f"{zlib.crc32(data[start:end]):08x}" for name, (start, end) in watch.spans.items() if name in held}


class CopyWatch(TorchDispatchMode):
    """Sees what is copied out of a piece of memory, also by way of other tensors."""

    def __init__(self, memory: torch.Tensor, entries: list[dict[str, Any]]) -> None:
        super().__init__()
        self.memory = memory
        self.spans: dict[str, tuple[int, int]] = {}
        self._entries = entries
        self._names_of: dict[int, set[str]] = {}
        self._alive: list[torch.Tensor] = []  # so that an address stays one tensor's
        self._copies: list[tuple[set[str], torch.Tensor, torch.Tensor]] = []
        for entry in entries:
            size = getattr(torch, entry["dtype"]).itemsize
            for extent in entry["shape"]:
                size *= extent
            self.spans[entry["name"]] = (entry["offset"], entry["offset"] + size)

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Views of the memory by name."""
        for entry in self._entries:
            start, end = self.spans[entry["name"]]
            yield entry["name"], self.memory[start:end].view(getattr(torch, entry["dtype"])).view(entry["shape"])

    def held(self, *, whole: bool) -> set[str]:
        """Names whose every copy is still in place; with ``whole`` only those that were copied to the last element."""
        counts: defaultdict[str, int] = defaultdict(int)
        changed: set[str] = set()
        for names, target, source in self._copies:
            same = torch.equal(target.nan_to_num(), source.to(target.dtype).expand_as(target).nan_to_num())
            for name in names:
                counts[name] += source.numel()
                changed |= set() if same else {name}
        wanted = {entry["name"]: _numel(entry) if whole else 1 for entry in self._entries}
        return {name for name, count in wanted.items() if counts[name] >= count} - changed

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.copy_.default:
            if names := self._sources(args[1]):
                self._copies.append((names, args[0], args[1]))
            return result
        names = set().union(*(self._sources(value) for value in tree_iter(args)))
        for made in tree_iter(result) if names else ():
            if isinstance(made, torch.Tensor) and not self._is_ours(made):
                self._names_of.setdefault(made.untyped_storage().data_ptr(), set()).update(names)
                self._alive.append(made)
        return result

    def _is_ours(self, tensor: torch.Tensor) -> bool:
        return int(tensor.untyped_storage().data_ptr()) == int(self.memory.untyped_storage().data_ptr())

    def _sources(self, value: Any) -> set[str]:
        """Names of the tensors that ``value`` was made of."""
        if not isinstance(value, torch.Tensor):
            return set()
        if not self._is_ours(value):
            return self._names_of.get(value.untyped_storage().data_ptr(), set())
        at = value.storage_offset() * value.itemsize
        return {name for name, (start, end) in self.spans.items() if start <= at < end}


def _numel(entry: dict[str, Any]) -> int:
    count = 1
    for extent in entry["shape"]:
        count *= extent
    return count
