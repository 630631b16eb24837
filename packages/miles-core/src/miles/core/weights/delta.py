"""What changed since the last version: every tensor as it is, as its change (``delta_code``), or not at all."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from miles.core.weights.checksum import checksum
from miles.core.weights.delta_code import encode


@dataclass(frozen=True, slots=True)
class Change:
    """What the tensors of a bucket mean when they are changes.  Tensors without an entry are whole."""

    base_version: str
    """The version that they change."""
    entries: dict[str, tuple[str, int]]
    """Dtype, and the number of elements that change, by the tensor's name."""

    def to_json(self) -> dict[str, Any]:
        entries = {name: {"dtype": dtype, "count": count} for name, (dtype, count) in self.entries.items()}
        return {"base_version": self.base_version, "tensors": entries}

    @classmethod
    def of_json(cls, value: dict[str, Any]) -> Change:
        """Raises KeyError, TypeError or ValueError for something else."""
        entries = {name: (str(entry["dtype"]), int(entry["count"])) for name, entry in value["tensors"].items()}
        return cls(str(value["base_version"]), entries)


class SentWeights:
    """A copy on the host of what was sent last."""

    def __init__(self) -> None:
        self.tensors: dict[str, torch.Tensor] = {}

    def keep(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors as they are, remembered on the way."""
        for name, tensor in tensors:
            self.remember(name, tensor)
            yield name, tensor

    def remember(self, name: str, new: torch.Tensor) -> None:
        """Keep a copy of ``new`` in the place of the tensor of this name."""
        kept = self.tensors.get(name)
        if kept is None or kept.shape != new.shape or kept.dtype != new.dtype:
            self.tensors[name] = torch.empty_like(new, device="cpu", memory_format=torch.contiguous_format)
        self.tensors[name].copy_(new.detach())


class ChangeTracker:
    """Remembers on the host what was sent last, and finds what differs."""

    def __init__(self) -> None:
        self.version: str | None = None
        """Of what is remembered; None: nothing, or something half sent."""
        self.entries: dict[str, tuple[str, int]] = {}
        self.checksums: dict[str, str] = {}
        """Of the whole new tensor, of every tensor that is sent as a change."""
        self._sent = SentWeights()

    def whole(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors as they are, remembered on the way."""
        self._begin()
        return self._sent.keep(tensors)

    def changes(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """What differs from the version before.  A change is described in ``entries``; equal tensors are left out.

        A tensor whose change would be no smaller is sent whole.
        """
        self._begin()
        for name, tensor in tensors:
            new = _on_host(tensor)
            change, count = encode(self._sent.tensors[name], new)
            if count and change.numel() >= new.nbytes:
                yield name, new
            elif count:
                self.entries[name] = (str(new.dtype).removeprefix("torch."), count)
                self.checksums[name] = checksum(new)
                yield name, change
            self._sent.remember(name, new)

    def describe(self, base_version: str, names: Iterable[str]) -> Change:
        """The entries of ``names``."""
        return Change(base_version, {name: self.entries[name] for name in names if name in self.entries})

    def finish(self, version: str) -> None:
        """Everything was taken by every engine."""
        self.version = version

    def _begin(self) -> None:
        self.version = None
        self.entries, self.checksums = {}, {}


def _on_host(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().cpu().contiguous()
