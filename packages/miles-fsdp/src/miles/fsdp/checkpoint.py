"""A training state on disk: torch DCP for tensors, JSON for counters, safetensors for generators.

Tensors carry their full shapes, so a checkpoint of one rank loads on several and the other way round.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file

from miles.core.errors import CheckpointError

_FORMAT = 1
_TENSORS = "tensors"
_COUNTERS = "state.json"


@dataclass(frozen=True, slots=True)
class Counters:
    """Where training stands."""

    steps_done: int
    """Optimizer steps."""
    world_size: int
    has_optimizer: bool


def write_tensors(directory: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write ``tensors`` (sharded ones by all ranks that hold a piece).  Collective."""
    with _quiet_alone():
        dcp.save(
            dict(tensors),
            storage_writer=dcp.FileSystemWriter(directory / _TENSORS, single_file_per_rank=True),
            no_dist=not dist.is_initialized(),
        )


def read_tensors(directory: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Fill ``tensors`` in place, whatever number of ranks wrote them.  Collective."""
    source = directory / _TENSORS
    if not source.is_dir():
        raise CheckpointError(f"{source} is missing: {directory} is not a checkpoint of the fsdp backend")
    try:
        with _quiet_alone():
            dcp.load(dict(tensors), storage_reader=dcp.FileSystemReader(source), no_dist=not dist.is_initialized())
    except dcp.api.CheckpointException as error:
        raise CheckpointError(f"{source} cannot be read: {error}") from error


@contextmanager
def _quiet_alone() -> Iterator[None]:
    """One rank without a process group is meant, so the warning about it says nothing."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        yield


def write_counters(directory: Path, counters: Counters) -> None:
    text = json.dumps({"format": _FORMAT, **asdict(counters)}, indent=2)
    (directory / _COUNTERS).write_text(text + "\n", encoding="utf-8")


def read_counters(directory: Path) -> Counters:
    path = directory / _COUNTERS
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if values.pop("format", None) != _FORMAT:
        raise CheckpointError(f"{path} has a format that this version does not read (it reads format {_FORMAT})")
    return Counters(**values)


def write_generators(directory: Path, rank: int) -> None:
    """Save this rank's random generators."""
    save_file(_generators(), directory / f"rng-{rank}.safetensors")


def read_generators(directory: Path, rank: int) -> None:
    """Restore what ``write_generators`` saved for this rank."""
    states = load_file(directory / f"rng-{rank}.safetensors")
    torch.set_rng_state(states["cpu"])
    if "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])


def _generators() -> dict[str, torch.Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state()
    return states
