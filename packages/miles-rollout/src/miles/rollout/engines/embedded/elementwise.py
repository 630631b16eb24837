"""Elementwise functions whose result for a number does not depend on where the number lies.

torch computes the last elements of a chunk one by one, with another exponential than the vectorized one, and it cuts
a tensor into one chunk per thread.  With sizes that are multiples of two vectors and no cut inside, no element is ever
computed that way.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

ELEMENT_MULTIPLE = 128
"""Elements that two threads share without cutting two vectors."""
_SERIAL_SIZE = 32768
"""torch does not share a tensor of this many elements, or fewer, among threads."""


def silu_(values: torch.Tensor) -> torch.Tensor:
    """``x * sigmoid(x)`` in place.  ``values`` is contiguous and has a multiple of ELEMENT_MULTIPLE elements."""
    flat = values.view(-1)
    if _undivided(flat):
        F.silu(flat, inplace=True)
    else:
        for piece in flat.split(_SERIAL_SIZE):
            F.silu(piece, inplace=True)
    return values


def piecewise(function: Callable[[torch.Tensor], torch.Tensor], values: torch.Tensor) -> torch.Tensor:
    """``function`` of each element.  The number of elements is a multiple of ELEMENT_MULTIPLE."""
    flat = values.reshape(-1)
    if _undivided(flat):
        return function(flat).view(values.shape)
    return torch.cat([function(piece) for piece in flat.split(_SERIAL_SIZE)]).view(values.shape)


def _undivided(flat: torch.Tensor) -> bool:
    """Whether threads share ``flat`` without cutting a vector; halves are still multiples of two vectors."""
    return bool(torch.get_num_threads() <= 2 or flat.numel() <= _SERIAL_SIZE)
