"""The proof that weights arrived: XXH3-64 of a tensor's bytes, which costs a third of copying them.

One flipped bit changes it, and so do two values that change places.
"""

from __future__ import annotations

import ctypes

import torch
import xxhash


def checksum(tensor: torch.Tensor) -> str:
    """Of the elements in their order, on the host: 16 hexadecimal digits."""
    held = tensor.detach().cpu().contiguous()
    # A view by `numpy()` would keep the memory from ever being released.
    view = (ctypes.c_char * held.nbytes).from_address(held.data_ptr()) if held.nbytes else b""
    return xxhash.xxh3_64_hexdigest(view)
