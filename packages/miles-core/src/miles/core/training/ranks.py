"""The ranks that share one rollout."""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.distributed as dist

from miles.core.training.context import ContextGroup
from miles.core.training.packing import Packing


class Ranks(Protocol):
    """What a training procedure needs of its data-parallel group."""

    @property
    def index(self) -> int:
        """This rank."""

    @property
    def count(self) -> int:
        """How many there are."""

    @property
    def has_output(self) -> bool:
        """Whether this rank sees the model's output; of a pipeline only the last stage does."""

    @property
    def context(self) -> ContextGroup | None:
        """The ranks that share this one's samples, which count as one rank; None: it has whole samples."""

    def adapted(self, packing: Packing) -> Packing:
        """How micro-batches are formed for models like these ranks have."""

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """``values`` of the ranks that have the output, summed, the same on every rank.  In place."""

    def publish(self, value: Any) -> Any:
        """A picklable ``value`` of a rank that has the output, for the other stages of its pipeline."""

    def gather(self, value: Any) -> list[Any]:
        """Every rank's picklable ``value``, in rank order."""


def process_rank() -> int:
    """Rank of this process in its role, whatever the axes of parallelism."""
    return dist.get_rank() if dist.is_initialized() else 0


class SingleRank:
    """No group at all."""

    index = 0
    count = 1
    has_output = True
    context = None

    def adapted(self, packing: Packing) -> Packing:
        return packing

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        return values

    def publish(self, value: Any) -> Any:
        return value

    def gather(self, value: Any) -> list[Any]:
        return [value]


class ProcessGroupRanks:
    """A torch.distributed process group, each of whose ranks has the whole model.

    With a ``context``, consecutive ranks of the group share samples.
    """

    has_output = True

    def __init__(self, group: dist.ProcessGroup | None = None, context: ContextGroup | None = None) -> None:
        self._group = group
        self._size = dist.get_world_size(group)
        self.context = context
        sharing = 1 if context is None else context.count
        self.index = dist.get_rank(group) // sharing
        self.count = self._size // sharing

    def adapted(self, packing: Packing) -> Packing:
        return packing if self.context is None else packing.shared_by(self.context.count)

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        dist.all_reduce(values, group=self._group)
        return values

    def publish(self, value: Any) -> Any:
        return value

    def gather(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * self._size
        dist.all_gather_object(values, value, group=self._group)
        return values
