"""Weights and optimizer in Megatron-Core's ``torch_dist`` format.

Tensors are stored whole, so that a checkpoint of one parallel layout loads in another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.api import CheckpointException

from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.core import CheckpointingException
from miles.core.driver.checkpoint import TRACKER_FILE, actor_state
from miles.core.driver.weights_only import RELEASE, has_release
from miles.core.errors import CheckpointError
from miles.core.training.writing import Writer
from miles.megatron.adapted_layers import has_adapters, is_adapter
from miles.megatron.deferred_tensors import DeferredTensors
from miles.megatron.language_model import LanguageModel
from miles.megatron.optimizer import Updater

WEIGHTS = "torch_dist"
_OF_WEIGHTS = "Is it of a model with the same layers (also those that --mtp-num-layers counts)?"
_OF_STATE = (
    "Megatron-Core loads the optimizer of a model with experts only with the --expert-model-parallel-size that it was "
    "saved with; its Hugging Face export can start a new run"
)
_LOSS_SCALER = "loss_scaler"


def write(directory: Path, chunks: Sequence[LanguageModel], updater: Updater | None) -> None:
    """Write weights, and the optimizer's state where ``updater`` is given.  Collective."""
    prepare(directory, chunks, updater, Writer(None, in_background=False), copies=False)()
    dist.barrier()


def prepare(
    directory: Path, chunks: Sequence[LanguageModel], updater: Updater | None, writer: Writer, *, copies: bool
) -> Callable[[], None]:
    """Write all but the tensors' bytes; the call of every rank that writes these, or copies of them.  Collective."""
    target = directory / WEIGHTS
    if dist.get_rank() == 0:
        target.mkdir(parents=True)
    dist.barrier()
    state = model_state(chunks)
    if updater is not None:
        updater.complete_state()
        state["optimizer"] = updater.optimizer.sharded_state_dict(state, metadata=_metadata())
        if updater.scaler is not None:
            state[_LOSS_SCALER] = {name: float(value) for name, value in updater.scaler.state.items()}
    tensors = DeferredTensors(writer, copies=copies)
    dist_checkpointing.save(state, str(target), sharded_strategy=tensors, content_metadata=content())
    return tensors.write


def read(directory: Path, chunks: Sequence[LanguageModel], updater: Updater | None) -> None:
    """Fill the model, and the optimizer where ``updater`` is given, from any parallel layout.  Collective."""
    _read(directory, chunks, updater, model_state(chunks))


def read_weights(directory: Path, chunks: Sequence[LanguageModel], *, with_head: bool = True) -> None:
    """Fill the model, without its adapters, and without its output layer unless ``with_head``.  Collective."""
    require_model(directory)
    state = model_state(chunks, adapters=False)
    if not with_head:
        state = {chunk: _without_head(tensors) for chunk, tensors in state.items()}
    _read(directory, chunks, None, state)


def _without_head(state: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in state.items() if not name.startswith("output_layer.")}


def _read(directory: Path, chunks: Sequence[LanguageModel], updater: Updater | None, state: dict[str, Any]) -> None:
    """What ``state`` names of the model."""
    source = directory / WEIGHTS
    if not source.is_dir():
        raise CheckpointError(f"{source} is missing: {directory} is not a checkpoint of the megatron backend")
    if updater is not None:
        state["optimizer"] = updater.optimizer.sharded_state_dict(state, is_loading=True, metadata=_metadata())
    try:
        loaded = dist_checkpointing.load(state, str(source))
        for name, chunk in zip(_names(chunks), chunks, strict=True):
            chunk.load_state_dict(loaded[name], strict=False)  # what was asked for and is missing, load refuses
        if updater is not None:
            with torch.no_grad():
                updater.optimizer.load_state_dict(loaded["optimizer"])
            if updater.scaler is not None:
                for name, value in loaded[_LOSS_SCALER].items():
                    updater.scaler.state[name].fill_(value)
    except (CheckpointingException, CheckpointException, KeyError, OSError) as error:
        raise CheckpointError(
            f"{source} cannot be read: {error!r}. {_OF_WEIGHTS if updater is None else _OF_STATE}"
        ) from error


def release_directory(directory: Path) -> Path:
    """Where a checkpoint of weights alone is in ``directory``."""
    return directory / RELEASE


def mark_release(directory: Path) -> None:
    """Make the release the newest checkpoint of ``directory``."""
    (directory / TRACKER_FILE).write_text(f"{RELEASE}\n", encoding="utf-8")


def holds_adapters(directory: Path) -> bool:
    """Whether the checkpoint is of a run that trains adapters, and has nothing else of the model."""
    source = directory / WEIGHTS
    if not (source / ".metadata").is_file():
        return False
    return any(is_adapter(name) for name in FileSystemReader(source).read_metadata().state_dict_metadata)


def require_model(directory: Path) -> None:
    """Raise CheckpointError where the checkpoint holds adapters."""
    if holds_adapters(directory):
        raise CheckpointError(
            f"{directory} holds the adapters of a run with --lora-rank alone, and no model. Name what that run has "
            "exported (--save-hf); as --ref-load it goes with the --lora-rank of that run"
        )


def is_torch_dist(directory: Path) -> bool:
    """Whether ``directory`` is a checkpoint of this format, or has some in it."""
    return (directory / WEIGHTS).is_dir() or (directory / TRACKER_FILE).is_file()


def resolve(directory: Path, step: int | None = None) -> Path:
    """The checkpoint at ``directory``: itself, a release, or the state of a run after ``step``, or its newest one."""
    for checkpoint in (directory, directory / "actor"):  # ``iter_0000007`` of a run has the actor in it
        if (checkpoint / WEIGHTS).is_dir():
            return checkpoint
    tracker = directory / TRACKER_FILE
    if not tracker.is_file():
        raise CheckpointError(f"{directory} is no checkpoint of the megatron backend: it has no {TRACKER_FILE}")
    if step is None and has_release(directory):
        return release_directory(directory)
    return actor_state(directory, step)


def model_state(chunks: Sequence[LanguageModel], *, adapters: bool | None = None) -> dict[str, Any]:
    return {name: _chunk_state(chunk, adapters) for name, chunk in zip(_names(chunks), chunks, strict=True)}


def _chunk_state(chunk: LanguageModel, adapters: bool | None) -> dict[str, Any]:
    """Of a model with adapters, training changes these alone."""
    state: dict[str, Any] = chunk.sharded_state_dict(metadata=_metadata())
    if not has_adapters(chunk):
        return state
    wanted = True if adapters is None else adapters
    return {name: value for name, value in state.items() if is_adapter(name) == wanted}


def _names(chunks: Sequence[LanguageModel]) -> list[str]:
    return ["model"] if len(chunks) == 1 else [f"model{number}" for number in range(len(chunks))]


def content() -> dict[str, Any]:
    """What a checkpoint says of its own layout."""
    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        "chained_optim_avoid_prefix": True,
        "singleton_local_shards": True,
    }


def _metadata() -> dict[str, Any]:
    return content() | {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
