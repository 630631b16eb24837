"""Tensors laid out one behind another in a byte buffer of bounded size."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from miles.core.errors import WeightSyncError
from miles.core.weights.adapter_form import AdapterForm
from miles.core.weights.delta import Change

ALIGNMENT = 64
"""Bytes.  A cache line, and a multiple of every dtype's size."""


@dataclass(frozen=True, slots=True)
class Slot:
    """Where one tensor lies in its bucket."""

    name: str
    dtype: str
    """Without the ``torch.`` prefix."""
    shape: tuple[int, ...]
    offset: int
    """Bytes from the bucket's start."""

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "dtype": self.dtype, "shape": list(self.shape), "offset": self.offset}


@dataclass(frozen=True, slots=True)
class Bucket:
    """A run of tensors that fits the buffer; a single larger tensor is a bucket of its own."""

    slots: tuple[Slot, ...]
    tensors: tuple[torch.Tensor, ...]
    nbytes: int
    """Size with alignment."""
    change: Change | None = None
    """Which of the tensors are changes, and of what."""
    whole_checksums: dict[str, str] = field(default_factory=dict)
    """What a tensor has after its change."""
    adapter: AdapterForm | None = None
    """The adapter that the tensors are of."""

    @property
    def named(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Names and tensors, in order."""
        for slot, tensor in zip(self.slots, self.tensors, strict=True):
            yield slot.name, tensor

    @property
    def payload_bytes(self) -> int:
        """Bytes of the tensors alone."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def request_fields(self) -> dict[str, Any]:
        """What a transport adds to its request, so that engines know changes from tensors."""
        return {} if self.change is None else {"delta": self.change.to_json()}

    def expected(self, written: Mapping[str, str]) -> dict[str, str]:
        """Checksums as engines are to hold the tensors, from those of what is ``written``."""
        return {name: self.whole_checksums.get(name, checksum) for name, checksum in written.items()}


def compare(url: str, sent: Mapping[str, str], held: Mapping[str, str]) -> None:
    """WeightSyncError that names the tensors whose checksum at the engine differs from what was sent."""
    wrong = [name for name, checksum in sent.items() if held.get(name) != checksum]
    if wrong:
        shown = ", ".join(wrong[:5]) + (f" and {len(wrong) - 5} more" if len(wrong) > 5 else "")
        raise WeightSyncError(f"engine {url} does not hold what was sent: {shown}")


def buckets(named_tensors: Iterable[tuple[str, torch.Tensor]], limit_bytes: int) -> Iterator[Bucket]:
    """Group tensors, in order, into buckets of at most ``limit_bytes``."""
    slots: list[Slot] = []
    tensors: list[torch.Tensor] = []
    end = 0
    for name, tensor in named_tensors:
        size = -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
        if slots and end + size > limit_bytes:
            yield Bucket(tuple(slots), tuple(tensors), end)
            slots, tensors, end = [], [], 0
        slots.append(Slot(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), end))
        tensors.append(tensor.detach())
        end += size
    if slots:
        yield Bucket(tuple(slots), tuple(tensors), end)
