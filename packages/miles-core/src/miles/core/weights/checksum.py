"""The proof that weights arrived: XXH3-64 of a tensor's bytes, a small part of the time that it takes to copy them.

One flipped bit changes it, and so do two values that change places.
"""

from __future__ import annotations

import ctypes
from ctypes import Array, c_char

import torch
import xxhash

_CACHED_BYTES = 512 << 10
"""What is read again at once comes from the processor's cache, not from memory."""


def checksum(tensor: torch.Tensor) -> str:
    """Of the elements in their order, on the host: 16 hexadecimal digits."""
    held = tensor.detach().cpu().contiguous()
    return xxhash.xxh3_64_hexdigest(_memory(held.data_ptr(), held.nbytes))


def copy(target: torch.Tensor, source: torch.Tensor) -> str:
    """Copy ``source`` into ``target`` of the same shape; checksum of what ``target`` holds then, in source's dtype."""
    if target.dtype == source.dtype and all(_lies_in_order(tensor) for tensor in (target, source)):
        return _copied(target.data_ptr(), source.data_ptr(), source.nbytes)
    target.copy_(source)
    return checksum(target.to(source.dtype))


def _lies_in_order(tensor: torch.Tensor) -> bool:
    return bool(tensor.device.type == "cpu" and tensor.is_contiguous())


def _copied(target: int, source: int, num_bytes: int) -> str:
    """Copy memory, and read every piece where it was written to, in less than two thirds of the time of two passes."""
    digest = xxhash.xxh3_64()
    for start in range(0, num_bytes, _CACHED_BYTES):
        size = min(_CACHED_BYTES, num_bytes - start)
        ctypes.memmove(target + start, source + start, size)
        digest.update(_memory(target + start, size))
    return digest.hexdigest()


def _memory(address: int, num_bytes: int) -> Array[c_char] | bytes:
    """Not a view by ``numpy()``, which would keep a tensor's memory from ever being released."""
    return (c_char * num_bytes).from_address(address) if num_bytes else b""
