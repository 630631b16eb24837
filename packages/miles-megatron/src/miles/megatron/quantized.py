"""Weights that a checkpoint holds in fewer bits, as the bf16 values that they stand for."""

from __future__ import annotations

from functools import cache

import torch

_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Of e2m1; the fourth bit is the sign."""
_BLOCK = 32
"""Values that share a scale."""
_AT_ONCE = 2**16
"""Blocks; what they take while they are computed stays in the cache."""


def mxfp4_values(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """MXFP4 of the Open Compute Project's Microscaling Formats (version 1.0): e2m1 in blocks of 32 with scales of e8m0.

    From ``blocks`` [..., G, 16], two values in a byte and the lower half first, and ``scales`` [..., G], to
    [..., 32 G].  Exact, but for what is too large for bf16.
    """
    pairs, powers = _pairs(), _powers()
    values = torch.empty(scales.numel(), _BLOCK, dtype=torch.bfloat16)
    rows = zip(
        values.split(_AT_ONCE),
        blocks.reshape(-1, _BLOCK // 2).split(_AT_ONCE),
        scales.reshape(-1).split(_AT_ONCE),
        strict=True,
    )
    for part, block, scale in rows:
        codes = pairs.index_select(0, block.reshape(-1).int()).view(torch.bfloat16).view(part.shape)
        torch.mul(codes, powers.index_select(0, scale.int()).unsqueeze(1), out=part)
    return values.view(*scales.shape[:-1], -1)


@cache
def _pairs() -> torch.Tensor:
    """[256]: the two values of a byte, side by side in the memory of one int32."""
    values = torch.tensor([sign * magnitude for sign in (1.0, -1.0) for magnitude in _MAGNITUDES])
    byte = torch.arange(256)
    return torch.stack([values[byte & 15], values[byte >> 4]], 1).bfloat16().view(torch.int32).view(-1)


@cache
def _powers() -> torch.Tensor:
    """[256]: what a scale multiplies with, 2^(scale - 127).  The last one is not a number."""
    exponents = torch.arange(256, dtype=torch.float64) - 127
    powers = torch.exp2(exponents).bfloat16()
    powers[255] = torch.nan
    return powers


def block_fp8_values(weight: torch.Tensor, scales: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """FP8 with a scale for each block of rows and columns, as DeepSeek-V3 is published (arXiv:2412.19437, 3.3).

    From ``weight`` [R, C] and ``scales`` [R / rows of a block, C / columns of a block], rounded up, to [R, C].
    """
    rows, columns = weight.shape
    whole = scales.repeat_interleave(block[0], 0)[:rows].repeat_interleave(block[1], 1)[:, :columns]
    return (weight.float() * whole).bfloat16()
