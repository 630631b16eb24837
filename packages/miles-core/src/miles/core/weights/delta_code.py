"""What changed in a tensor, in few bytes, bit for bit.

Elements are compared and moved as integers of their bits.  Most changes of half-precision weights are one step to a
neighbouring number, so a change is told by a code of two bits: one step up, one step down, a step of -128 to 127, or
a new value.  The bytes of a change are, one behind another: the codes, four in a byte; the steps, one byte each; the
new values; the gaps between the positions, one byte each.  A gap of 255 or more is written as so many 255s (each moves
on by 255 elements without a change) and the rest.
"""

from __future__ import annotations

import torch

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""By bytes per element: equality of bits, also of NaNs and zeros of different sign."""
_UP, _DOWN, _STEP, _VALUE = range(4)
_CODES_PER_BYTE = 4
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
    codes = torch.full_like(steps, _VALUE, dtype=torch.uint8)
    codes[(steps >= -128) & (steps <= 127)] = _STEP
    codes[steps == 1], codes[steps == -1] = _UP, _DOWN
    parts = [
        _packed(codes),
        steps[codes == _STEP].to(torch.int8).view(torch.uint8),
        values[codes == _VALUE].view(torch.uint8),
        _gaps(index),
    ]
    return torch.cat(parts), len(index)


def apply(change: torch.Tensor, count: int, base: torch.Tensor) -> None:
    """Make the change of ``count`` elements in ``base`` (contiguous, on the host); ValueError when it is not one."""
    held = _bits(base)
    num_codes = -(-count // _CODES_PER_BYTE)
    codes = _unpacked(change[:num_codes])[:count]
    is_step, is_value = codes == _STEP, codes == _VALUE
    values_at = num_codes + int(is_step.sum())
    gaps_at = values_at + int(is_value.sum()) * held.itemsize
    index = _positions(change[gaps_at:])
    if change.numel() < gaps_at or len(codes) != count or len(index) != count:
        raise ValueError(f"{change.numel()} bytes are not a change of {count} values")
    if count and int(index[-1]) >= held.numel():
        raise ValueError(f"a change at element {int(index[-1])} of {held.numel()}")
    steps = torch.where(codes == _UP, 1, torch.where(codes == _DOWN, -1, 0))
    steps[is_step] = change[num_codes:values_at].view(torch.int8).long()
    values = (held[index].long() + steps).to(held.dtype)
    values[is_value] = change[values_at:gaps_at].clone().view(held.dtype)  # cloned, because it may begin anywhere
    held[index] = values


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(_INTEGERS[tensor.element_size()])


def _packed(codes: torch.Tensor) -> torch.Tensor:
    full = torch.nn.functional.pad(codes, (0, -len(codes) % _CODES_PER_BYTE)).view(-1, _CODES_PER_BYTE)
    return full[:, 0] | full[:, 1] << 2 | full[:, 2] << 4 | full[:, 3] << 6


def _unpacked(packed: torch.Tensor) -> torch.Tensor:
    return torch.stack([packed >> shift & 3 for shift in (0, 2, 4, 6)], 1).view(-1)


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
