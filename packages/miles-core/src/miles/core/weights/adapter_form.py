"""An adapter that engines add to their model themselves: what they are told of it before its tensors come.

The tensors travel like weights, under the names that PEFT gives them without its prefix: ``LAYER.lora_A.weight``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

PARTS = ("lora_A", "lora_B")
"""[r, I] and [O, r], for rank r, inputs I and outputs O of the layer."""


@dataclass(frozen=True, slots=True)
class AdapterForm:
    """An adapter without its values."""

    rank: int
    alpha: float
    """What the adapter computes is scaled by ``alpha / rank``."""
    layers: tuple[str, ...]
    """Linear layers, by their Hugging Face names."""

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def names(self) -> list[str]:
        """Of all tensors, in the order in which they travel."""
        return [tensor_name(layer, part) for layer in self.layers for part in PARTS]

    def to_json(self) -> dict[str, Any]:
        return {"rank": self.rank, "alpha": self.alpha, "layers": list(self.layers)}

    @classmethod
    def of_json(cls, value: Mapping[str, Any]) -> AdapterForm:
        """Raises KeyError, TypeError or ValueError for something else."""
        rank, alpha = int(value["rank"]), float(value["alpha"])
        if rank < 1:
            raise ValueError(f"rank {rank} is below 1")
        return cls(rank, alpha, tuple(str(layer) for layer in value["layers"]))


def tensor_name(layer: str, part: str) -> str:
    """Of ``lora_A`` or ``lora_B`` of a layer."""
    return f"{layer}.{part}.weight"
