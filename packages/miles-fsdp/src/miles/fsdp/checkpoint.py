"""The tensors of a training state on disk, in torch's distributed format.

Tensors carry their full shapes, so a checkpoint of one rank loads on several and the other way round.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from miles.core.errors import CheckpointError
from miles.core.training.writing import Writer

_TENSORS = "tensors"


def write_tensors(writer: Writer, directory: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write ``tensors`` (sharded ones by all ranks that hold a piece), or begin to write copies.  Collective."""
    writer.finish()
    kept = {name: _on_host(tensor) for name, tensor in tensors.items()} if writer.in_background else tensors
    writer.write(lambda: _write(directory, kept, writer.group))


@torch.no_grad()  # type: ignore[untyped-decorator]
def _on_host(tensor: torch.Tensor) -> torch.Tensor:
    """A copy that training does not change."""
    return tensor.detach().to("cpu", copy=True)


def _write(directory: Path, tensors: Mapping[str, torch.Tensor], group: dist.ProcessGroup | None) -> None:
    with _quiet_alone():
        dcp.save(
            dict(tensors),
            storage_writer=dcp.FileSystemWriter(directory / _TENSORS, single_file_per_rank=True),
            process_group=group,
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
