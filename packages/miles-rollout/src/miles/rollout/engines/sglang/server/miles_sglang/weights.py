# mypy: disable-error-code="import-not-found,no-untyped-call"
"""Weights as Miles' transports bring them, whole or as changes, and the proof that they arrived.

``shm``: a ``SharedBucket``, with ``delta`` where some of the tensors are changes.  ``broadcast``: SGLang's own, with
the description of changes as its load format.  ``disk``: a directory of safetensors files with ``miles.json``.

SGLang's models lay weights out anew and skip names that they do not know, so every copy that a model makes is watched:
what it did not take, or does not hold afterwards, is not confirmed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from functools import wraps
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors.torch import load_file
from sglang.srt.distributed.parallel_state import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from sglang.srt.managers.tp_worker import BaseTpWorker
from sglang.srt.model_executor.model_runner_components.weight_updater import WeightUpdater
from sglang.srt.runtime_context import get_serving

from miles_sglang import changes
from miles_sglang.copy_watch import CopyWatch
from miles_sglang.shared_bucket import SharedBucket

LOAD_FORMAT = "miles_shm"
CHANGES_FORMAT = "miles_changes:"
"""Before the description, in JSON."""
DESCRIPTION = "miles.json"
Tensors = Mapping[str, torch.Tensor]
_kept = changes.wanted()


def install() -> None:
    """Teach SGLang the formats."""
    WeightUpdater.update_weights_from_tensor = _or_from_bucket(WeightUpdater.update_weights_from_tensor)
    WeightUpdater.receive_weights_from_distributed = _or_changes(WeightUpdater.receive_weights_from_distributed)
    WeightUpdater.load_weights_from_distributed = _with_proof(WeightUpdater.load_weights_from_distributed)
    WeightUpdater.update_weights_from_disk = _or_described(WeightUpdater.update_weights_from_disk)
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
        return _answer(lambda: load_bucket(self.get_model(), named_tensors, self.device))

    return update_weights


def _or_changes(receive: Any) -> Any:
    @wraps(receive)
    def receive_weights(self: Any, *, load_format: str | None = None, **named: Any) -> Any:
        if load_format is None or not load_format.startswith(CHANGES_FORMAT):
            received = receive(self, load_format=load_format, **named)
            return received if _kept is None else list(_whole(dict(received), None).items())
        change = json.loads(load_format.removeprefix(CHANGES_FORMAT))
        return list(_whole(dict(receive(self, load_format=None, **named)), change).items())

    return receive_weights


def _with_proof(load: Any) -> Any:
    @wraps(load)
    def load_weights(self: Any, named_tensors: list[tuple[str, torch.Tensor]]) -> tuple[bool, str]:
        if self.device != "cpu" and _kept is None:  # to bring everything to the host takes longer than to send it
            answer: tuple[bool, str] = load(self, named_tensors)
            return answer
        return _answer(lambda: load_watched(self.get_model(), dict(named_tensors), self.device))

    return load_weights


def _or_described(update: Any) -> Any:
    @wraps(update)
    def update_weights(self: Any, model_path: str, *args: Any, **named: Any) -> tuple[bool, str]:
        if not (Path(model_path) / DESCRIPTION).is_file():
            answer: tuple[bool, str] = update(self, model_path, *args, **named)
            return answer
        return _answer(lambda: load_directory(self.get_model(), Path(model_path), self.device))

    return update_weights


def _answer(load: Any) -> tuple[bool, str]:
    try:
        return True, json.dumps({"checksums": load()})
    except Exception as error:
        if get_tensor_model_parallel_rank():  # the first rank alone answers; what another one misses must not pass
            raise
        return False, f"{type(error).__name__}: {error}"


def load_bucket(model: Any, layout: Mapping[str, Any], device: str) -> dict[str, str]:
    """Load the tensors of shared memory; return XXH3-64 of those that the model holds now, as 16 hex digits."""
    bucket = SharedBucket(layout)
    if device != "cpu" or _kept is not None:  # everything is copied before the model sees any of it
        bucket.wait()
    return load_watched(model, _whole(bucket.tensors, layout.get("delta")), device, bucket.wait_for)


def load_directory(model: Any, directory: Path, device: str) -> dict[str, str]:
    """Load the files one after another; what is held as from ``load_bucket``."""
    change = json.loads((directory / DESCRIPTION).read_text(encoding="utf-8")).get("delta")
    held: dict[str, str] = {}
    for file in sorted(directory.glob("*.safetensors")):
        held |= load_watched(model, _whole(load_file(file), change), device)
    return held


def load_watched(
    model: Any, tensors: Tensors, device: str, arrived: Callable[[str], None] | None = None
) -> dict[str, str]:
    """Load whole tensors; XXH3-64 of those that the model holds now.

    ``arrived`` returns once the tensor of that name is there.
    """
    watch = CopyWatch({name: tensor.to(device).contiguous() for name, tensor in tensors.items()})

    def arriving() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in watch.tensors.items():
            if arrived is not None:
                arrived(name)
            yield name, tensor

    with torch.no_grad(), watch:
        model.load_weights(arriving())
    if any(watch.is_ours(tensor) for tensor in (*model.parameters(), *model.buffers())):
        raise RuntimeError("the model kept a view of the weights that it was to copy")
    held = watch.held(whole=get_tensor_model_parallel_world_size() == 1)
    return {name: _checksum(tensor) for name, tensor in tensors.items() if name in held}


def _whole(tensors: Tensors, change: Mapping[str, Any] | None) -> Tensors:
    if _kept is None and change is not None:
        raise ValueError("this server keeps no weights that a change could be made of")
    return tensors if _kept is None else _kept.take(tensors, change, str(get_serving().weight_version))


def _checksum(tensor: torch.Tensor) -> str:
    data = tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy()
    return xxhash.xxh3_64_hexdigest(memoryview(data))
