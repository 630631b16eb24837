"""A stream of tensors through shared memory that holds all of it.

The file begins with a cache line that holds the number of bytes that are there, and a line for each reader, which is
left alone.
"""

from __future__ import annotations

import ctypes
import math
import time
from collections.abc import Mapping
from typing import Any

import torch

_LINE_BYTES = 64
_GIVEN_UP = -1
_NAP_S = 20e-6


class SharedBucket:
    """``layout``: ``{"path", "num_readers", "ring_bytes", "tensors": [{"name", "dtype", "shape", "offset"}]}``.

    ``tensors``: views of the shared memory, by name; the trainer is still filling it.
    """

    def __init__(self, layout: Mapping[str, Any]) -> None:
        first = _LINE_BYTES * (1 + layout["num_readers"])
        memory = torch.from_file(layout["path"], shared=True, size=first + layout["ring_bytes"], dtype=torch.uint8)
        self._memory = memory  # lives as long as the address is used
        self._count = ctypes.c_int64.from_address(memory.data_ptr())
        self._ends: dict[str, int] = {}
        self.tensors: dict[str, torch.Tensor] = {}
        for entry in layout["tensors"]:
            name, dtype, start = entry["name"], getattr(torch, entry["dtype"]), entry["offset"]
            self._ends[name] = end = start + dtype.itemsize * math.prod(entry["shape"])
            if end > layout["ring_bytes"]:
                raise ValueError(f"{name} ends at byte {end}; the shared memory has room for {layout['ring_bytes']}")
            self.tensors[name] = memory[first + start : first + end].view(dtype).view(entry["shape"])

    def wait(self) -> None:
        """Return when all tensors are there."""
        for name in self.tensors:
            self.wait_for(name)

    def wait_for(self, name: str, *, patience_s: float = 120.0) -> None:
        """Return when the tensor is there; RuntimeError when nothing more came for ``patience_s`` seconds."""
        seen, deadline = _GIVEN_UP, 0.0
        while (count := self._count.value) < self._ends[name]:
            if count == _GIVEN_UP:
                raise RuntimeError("the trainer gave the update up before all of its bytes were there")
            if count != seen:
                seen, deadline = count, time.monotonic() + patience_s
            elif time.monotonic() > deadline:
                raise RuntimeError(f"the trainer stopped at byte {count} of the update, {patience_s:g} s ago")
            time.sleep(_NAP_S)
