# mypy: disable-error-code="misc,no-untyped-call"
"""What a model takes out of a piece of memory when it loads weights from there, and whether it still holds it."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


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
            size = getattr(torch, entry["dtype"]).itemsize * math.prod(entry["shape"])
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
        wanted = {entry["name"]: math.prod(entry["shape"]) if whole else 1 for entry in self._entries}
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
