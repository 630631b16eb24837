"""What changed in a tensor since the last version: positions and new values, bit for bit.

A change of one tensor is one run of bytes: the new values, then the gaps between their positions, one byte each.  A gap
of 255 or more is written as so many 255s (each moves on by 255 elements without a value) and the rest.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from miles.core.weights.checksum import checksum

_LONG_GAP = 255
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""By bytes per element: equality of bits, also of NaNs and zeros of different sign."""


@dataclass(frozen=True, slots=True)
class Change:
    """What the tensors of a bucket mean when they are changes.  Tensors without an entry are whole."""

    base_version: str
    """The version that they change."""
    entries: dict[str, tuple[str, int]]
    """Dtype of the values and their number, by the tensor's name."""

    def to_json(self) -> dict[str, Any]:
        entries = {name: {"dtype": dtype, "count": count} for name, (dtype, count) in self.entries.items()}
        return {"base_version": self.base_version, "tensors": entries}

    @classmethod
    def of_json(cls, value: dict[str, Any]) -> Change:
        """Raises KeyError, TypeError or ValueError for something else."""
        entries = {name: (str(entry["dtype"]), int(entry["count"])) for name, entry in value["tensors"].items()}
        return cls(str(value["base_version"]), entries)


class ChangeTracker:
    """Remembers on the host what was sent last, and finds what differs."""

    def __init__(self) -> None:
        self.version: str | None = None
        """Of what is remembered; None: nothing, or something half sent."""
        self.entries: dict[str, tuple[str, int]] = {}
        self.checksums: dict[str, str] = {}
        """Of the whole new tensor, of every tensor that is sent as a change."""
        self._sent: dict[str, torch.Tensor] = {}

    def whole(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors as they are, remembered on the way."""
        self._begin()
        for name, tensor in tensors:
            self._remember(name, _on_host(tensor))
            yield name, tensor

    def changes(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """What differs from the version before.  A change is described in ``entries``; equal tensors are left out.

        A tensor whose change would be no smaller is sent whole.
        """
        self._begin()
        for name, tensor in tensors:
            new = _on_host(tensor)
            change, count = encode(self._sent[name], new)
            if change.numel() >= new.nbytes:
                yield name, new
            elif count:
                self.entries[name] = (str(new.dtype).removeprefix("torch."), count)
                self.checksums[name] = checksum(new)
                yield name, change
            self._remember(name, new)

    def describe(self, base_version: str, names: Iterable[str]) -> Change:
        """The entries of ``names``."""
        return Change(base_version, {name: self.entries[name] for name in names if name in self.entries})

    def finish(self, version: str) -> None:
        """Everything was taken by every engine."""
        self.version = version

    def _begin(self) -> None:
        self.version = None
        self.entries, self.checksums = {}, {}

    def _remember(self, name: str, new: torch.Tensor) -> None:
        kept = self._sent.get(name)
        if kept is None or kept.shape != new.shape or kept.dtype != new.dtype:
            self._sent[name] = new.clone()
        else:
            kept.copy_(new)


def encode(old: torch.Tensor, new: torch.Tensor) -> tuple[torch.Tensor, int]:
    """The change from ``old`` to ``new`` (same shape and dtype, on the host) as bytes, and how many values it has."""
    if old.shape != new.shape or old.dtype != new.dtype:
        raise ValueError(f"a change from {old.dtype} {list(old.shape)} to {new.dtype} {list(new.shape)} has no base")
    integers = _INTEGERS[new.element_size()]
    before, after = old.reshape(-1).view(integers), new.reshape(-1).view(integers)
    index = (before != after).nonzero().view(-1)
    if not len(index):
        return torch.empty(0, dtype=torch.uint8), 0
    gaps = torch.diff(index, prepend=index.new_tensor([-1])) - 1
    num_long = gaps // _LONG_GAP
    written = torch.full((len(gaps) + int(num_long.sum()),), _LONG_GAP, dtype=torch.uint8)
    written[(num_long + 1).cumsum(0) - 1] = (gaps % _LONG_GAP).to(torch.uint8)
    return torch.cat([after[index].view(torch.uint8), written]), len(index)


def decode(change: torch.Tensor, dtype: torch.dtype, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions [count], ascending, and values [count] of a change; ValueError when it is not one."""
    size = count * dtype.itemsize
    gaps = change[size:].long()
    ends = gaps != _LONG_GAP
    if change.numel() < size or int(ends.sum()) != count or (len(ends) and not ends[-1]):
        raise ValueError(f"{change.numel()} bytes are not a change of {count} values")
    index = torch.where(ends, gaps + 1, gaps).cumsum(0)[ends] - 1
    return index, change[:size].clone().view(dtype)


def _on_host(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().cpu().contiguous()
