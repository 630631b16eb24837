"""What changed in a tensor, in few bytes, bit for bit.

Elements are compared and moved as integers of their bits.  Most changes of half-precision weights are one step to a
neighbouring number, or a few, so a change is told by its step in one byte; what is no step of -127 to 127 is told by
-128 and the new value.  The gap to the change before is one byte as well: a gap of 255 or more is written as so many
255s (each moves on by 255 elements without a change) and the rest.  Huffman codes (zlib's) make a quarter of a step and
three quarters of a gap.  The bytes of a change are, one behind another: steps and gaps, each a zlib stream, and the new
values.
"""

from __future__ import annotations

import zlib

import torch

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""By bytes per element: equality of bits, also of NaNs and zeros of different sign."""
_VALUE = -128
_LONG_GAP = 255


def encode(old: torch.Tensor, new: torch.Tensor) -> tuple[torch.Tensor, int]:
    """The change from ``old`` to ``new`` (same shape and dtype, on the host) as bytes, and the number of elements."""
    if old.shape != new.shape or old.dtype != new.dtype:
        raise ValueError(f"a change from {old.dtype} {list(old.shape)} to {new.dtype} {list(new.shape)} has no base")
    before, after = _bits(old), _bits(new)
    index = (before != after).nonzero().view(-1)
    if not len(index):
        return torch.empty(0, dtype=torch.uint8), 0
    values = after[index]
    steps = values.long() - before[index].long()
    steps[(steps <= _VALUE) | (steps >= -_VALUE)] = _VALUE
    parts = [_squeezed(steps.to(torch.int8)), _squeezed(_gaps(index)), values[steps == _VALUE].view(torch.uint8)]
    return torch.cat(parts), len(index)


def apply(change: torch.Tensor, count: int, base: torch.Tensor) -> None:
    """Make the change of ``count`` elements in ``base`` (contiguous, on the host); ValueError when it is not one."""
    if count == change.numel() == 0:
        return
    held = _bits(base)
    steps, rest = _expanded(change.numpy().tobytes())
    gaps, told = _expanded(rest)
    index, is_value = _positions(gaps), steps.view(torch.int8) == _VALUE
    if len(steps) != count or len(index) != count or len(told) != int(is_value.sum()) * held.itemsize:
        raise ValueError(f"{change.numel()} bytes are not a change of {count} values")
    if count and int(index[-1]) >= held.numel():
        raise ValueError(f"a change at element {int(index[-1])} of {held.numel()}")
    values = (held[index].long() + steps.view(torch.int8)).to(held.dtype)
    if told:
        values[is_value] = torch.frombuffer(bytearray(told), dtype=held.dtype)
    held[index] = values


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(_INTEGERS[tensor.element_size()])


def _squeezed(column: torch.Tensor) -> torch.Tensor:
    """Huffman codes alone: there is nothing that repeats, and looking for it takes ten times as long."""
    coder = zlib.compressobj(strategy=zlib.Z_HUFFMAN_ONLY)
    data = coder.compress(column.numpy()) + coder.flush()
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _expanded(data: bytes) -> tuple[torch.Tensor, bytes]:
    """The first stream's bytes, and what follows it."""
    decoder = zlib.decompressobj()
    try:
        column = decoder.decompress(data)
    except zlib.error as error:
        raise ValueError(f"{len(data)} bytes are not a change ({error})") from error
    if not decoder.eof or not column:
        raise ValueError(f"{len(data)} bytes are not a change of a tensor")
    return torch.frombuffer(bytearray(column), dtype=torch.uint8), decoder.unused_data


def _gaps(index: torch.Tensor) -> torch.Tensor:
    gaps = torch.diff(index, prepend=index.new_tensor([-1])) - 1
    num_long = gaps // _LONG_GAP
    written = torch.full((len(gaps) + int(num_long.sum()),), _LONG_GAP, dtype=torch.uint8)
    written[(num_long + 1).cumsum(0) - 1] = (gaps % _LONG_GAP).to(torch.uint8)
    return written


def _positions(written: torch.Tensor) -> torch.Tensor:
    """Ascending; none when the last gap has no end."""
    gaps = written.long()
    ends = gaps != _LONG_GAP
    if not len(ends) or not ends[-1]:
        return gaps[:0]
    return torch.where(ends, gaps + 1, gaps).cumsum(0)[ends] - 1
