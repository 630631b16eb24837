# mypy: disable-error-code="misc,no-untyped-call"
"""What a model takes out of the tensors that it loads, and whether it still holds it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class CopyWatch(TorchDispatchMode):
    """Sees what is copied out of contiguous tensors, also by way of other tensors."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self.tensors = tensors
        self._spans: defaultdict[int, list[tuple[str, int, int]]] = defaultdict(list)
        """Names and bytes by the address of the memory that they share."""
        for name, tensor in tensors.items():
            start = tensor.storage_offset() * tensor.itemsize
            self._spans[_home(tensor)].append((name, start, start + tensor.nbytes))
        self._names_of: dict[int, set[str]] = {}
        self._alive: list[torch.Tensor] = []  # so that an address stays one tensor's
        self._copies: list[tuple[set[str], torch.Tensor, torch.Tensor]] = []

    def is_ours(self, tensor: torch.Tensor) -> bool:
        """Whether it lies in the memory of a watched tensor."""
        return _home(tensor) in self._spans and tensor.nbytes > 0

    def held(self, *, whole: bool) -> set[str]:
        """Names whose every copy is still in place; with ``whole`` only those that were copied to the last element."""
        counts: defaultdict[str, int] = defaultdict(int)
        changed: set[str] = set()
        for names, target, source in self._copies:
            same = torch.equal(target.nan_to_num(), source.to(target.dtype).expand_as(target).nan_to_num())
            for name in names:
                counts[name] += source.numel()
                changed |= set() if same else {name}
        wanted = {name: tensor.numel() if whole else 1 for name, tensor in self.tensors.items()}
        return {name for name, count in wanted.items() if counts[name] >= count} - changed

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.copy_.default:
            if names := self._sources(args[1]):
                self._copies.append((names, args[0], args[1]))
            return result
        names = set().union(*(self._sources(value) for value in tree_iter(args)))
        for made in tree_iter(result) if names else ():
            if isinstance(made, torch.Tensor) and not self.is_ours(made):
                self._names_of.setdefault(_home(made), set()).update(names)
                self._alive.append(made)
        return result

    def _sources(self, value: Any) -> set[str]:
        """Names of the tensors that ``value`` was made of."""
        if not isinstance(value, torch.Tensor):
            return set()
        home = _home(value)
        if home not in self._spans:
            return self._names_of.get(home, set())
        at = value.storage_offset() * value.itemsize
        return {name for name, start, end in self._spans[home] if start <= at < end}


def _home(tensor: torch.Tensor) -> int:
    """Address of the memory that a tensor shares with its views."""
    return int(tensor.untyped_storage().data_ptr())
