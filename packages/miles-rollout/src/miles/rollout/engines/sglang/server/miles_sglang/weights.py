# mypy: disable-error-code="import-not-found"
"""Weights from shared memory: the ``load_format`` of Miles' ``shm`` transport, and the proof that they arrived.

A bucket is ``{"path", "nbytes", "tensors": [{"name", "dtype", "shape", "offset"}]}``.  SGLang's models lay weights out
anew and skip names that they do not know, so every copy that a model makes out of the bucket is watched: what it did
not take, or does not hold afterwards, is not confirmed.
"""

from __future__ import annotations

import json
from functools import wraps
from typing import Any

import torch
import xxhash
from sglang.srt.distributed.parallel_state import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from sglang.srt.managers.tp_worker import BaseTpWorker
from sglang.srt.model_executor.model_runner_components.weight_updater import WeightUpdater

from miles_sglang.copy_watch import CopyWatch

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
    """Load the tensors; return XXH3-64 of those that the model holds now, as 16 hex digits."""
    shared = torch.from_file(bucket["path"], shared=False, size=bucket["nbytes"], dtype=torch.uint8)
    watch = CopyWatch(shared.to(device), bucket["tensors"])
    with torch.no_grad(), watch:
        model.load_weights(list(watch.tensors()))
    home = watch.memory.untyped_storage().data_ptr()
    if any(tensor.untyped_storage().data_ptr() == home for tensor in (*model.parameters(), *model.buffers())):
        raise RuntimeError("the model kept a view of the shared memory instead of a copy")
    data = memoryview(shared.numpy())
    held = watch.held(whole=get_tensor_model_parallel_world_size() == 1)
    return {
        name: xxhash.xxh3_64_hexdigest(data[start:end]) for name, (start, end) in watch.spans.items() if name in held
    }
