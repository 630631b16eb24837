"""A vocabulary divided among the ranks of a process group."""

from __future__ import annotations

import torch
import torch.distributed as dist


class GroupVocabularyShard:
    """This rank's rows of a head that is divided among ``group``; the first of them is token ``first``."""

    def __init__(self, group: dist.ProcessGroup | None, first: int) -> None:
        self._group = group
        self.first = first

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        dist.all_reduce(x, group=self._group)
        return x

    def max(self, x: torch.Tensor) -> torch.Tensor:
        dist.all_reduce(x, op=dist.ReduceOp.MAX, group=self._group)
        return x
