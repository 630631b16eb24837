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

from miles.core.driver.background import Background
from miles.core.errors import CheckpointError

_TENSORS = "tensors"


class Writer:
    """Writes tensors at once, or a copy of them in a thread while training goes on.

    The thread's exchanges between ranks have a group of their own, since those of training go on as well.
    """

    def __init__(self, group: dist.ProcessGroup | None, *, in_background: bool) -> None:
        self._group = group
        self._in_background = in_background
        self._writing: Background[None] | None = None

    @classmethod
    def of_ranks(cls, *, in_background: bool) -> Writer:
        """The writer of all ranks.  Collective."""
        group = dist.new_group(backend="gloo") if in_background and dist.is_initialized() else None
        return cls(group, in_background=in_background)

    def write(self, directory: Path, tensors: Mapping[str, torch.Tensor]) -> None:
        """Write ``tensors`` (sharded ones by all ranks that hold a piece), or begin to.  Collective."""
        self.finish()
        if not self._in_background:
            _write(directory, tensors, self._group)
            return
        copies = {name: _on_host(tensor) for name, tensor in tensors.items()}
        self._writing = Background(lambda: _write(directory, copies, self._group), name="checkpoint-tensors")

    def finish(self) -> None:
        """Return when everything is on disk; raise what went wrong."""
        if self._writing is not None:
            self._writing.result()


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
