"""Rotary position embeddings (arXiv:2104.09864): the default, linear and Llama 3 kinds."""

from __future__ import annotations

import math
from typing import Any

import torch

KINDS = ("default", "linear", "llama3")


def rope_parameters(config: dict[str, Any]) -> dict[str, Any]:
    """The rope settings of a model's configuration, as transformers 4 or 5 writes them."""
    rope = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    rope["rope_type"] = rope.get("rope_type") or rope.get("type") or "default"
    rope["rope_theta"] = rope.get("rope_theta") or config.get("rope_theta") or 10000.0
    return rope


class Rotary:
    """Cosines and sines by position, computed as far as they are needed.

    The sine's sign is that of ``(-x2, x1)``, so that rotating needs no negation.
    """

    def __init__(self, rope: dict[str, Any], dim: int, dtype: torch.dtype) -> None:
        self._frequencies = _frequencies(rope, dim)
        self._dtype = dtype
        self._table = torch.empty(0, 2, dim, dtype=dtype)

    def at(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines [M, 1, D] at ``positions`` [M]."""
        needed = int(positions.max()) + 1
        if needed > self._table.shape[0]:
            self._table = self._compute(max(needed, 2 * self._table.shape[0], 256))
        rows = self._table.index_select(0, positions)
        return rows[:, :1], rows[:, 1:]

    def _compute(self, length: int) -> torch.Tensor:
        angles = torch.outer(torch.arange(length, dtype=torch.float32), self._frequencies)
        sin = angles.sin()
        cos = angles.cos()
        return torch.stack([torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)], 1).to(self._dtype)


def _frequencies(rope: dict[str, Any], dim: int) -> torch.Tensor:
    """[D / 2] radians per position."""
    frequencies = 1.0 / (rope["rope_theta"] ** (torch.arange(0, dim, 2, dtype=torch.int64).float() / dim))
    if rope["rope_type"] == "linear":
        return frequencies / rope["factor"]
    if rope["rope_type"] == "llama3":
        return _llama3(frequencies, rope)
    return frequencies


def _llama3(frequencies: torch.Tensor, rope: dict[str, Any]) -> torch.Tensor:
    """Llama 3's context extension: low frequencies are divided, high ones kept, the band between is blended."""
    length, factor = rope["original_max_position_embeddings"], rope["factor"]
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    wavelengths = 2 * math.pi / frequencies
    blend = (length / wavelengths - low) / (high - low)
    blended = (1 - blend) * frequencies / factor + blend * frequencies
    scaled = torch.where(wavelengths > length / low, frequencies / factor, frequencies)
    between = (wavelengths <= length / low) & (wavelengths >= length / high)
    return torch.where(between, blended, scaled)
