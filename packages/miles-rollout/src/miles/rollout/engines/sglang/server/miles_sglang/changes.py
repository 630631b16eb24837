"""Weights under their checkpoint's names, kept on the host so that a change of them gives the whole tensors again.

A model lays its weights out anew as it loads them; what it holds cannot be changed name by name.
"""

from __future__ import annotations

import os
import runpy
from collections.abc import Callable, Mapping
from typing import Any

import torch

VARIABLE = "MILES_CHANGE_CODE"
"""Names the file with ``apply(change, count, base)``, the format that the trainer writes."""
MARK = "miles_weight_delta"
"""In /server_info among the weight loaders: this is how a trainer knows."""


class KeptWeights:
    """As much memory as the checkpoint, in every process that loads weights."""

    def __init__(self, apply: Callable[[torch.Tensor, int, torch.Tensor], None]) -> None:
        self._apply = apply
        self._tensors: dict[str, torch.Tensor] = {}

    def take(
        self, tensors: Mapping[str, torch.Tensor], change: Mapping[str, Any] | None, version: str
    ) -> dict[str, torch.Tensor]:
        """The whole tensors.  ``change`` tells which of them are changes; ``version`` is the one that is held.

        ValueError for changes of something else.
        """
        entries = {} if change is None else change["tensors"]
        if change is not None and change["base_version"] != version:
            raise ValueError(f"these are changes of version {change['base_version']}; {version} is held")
        for name, tensor in tensors.items():
            if name in entries:
                self._change(name, tensor.cpu(), entries[name])
            else:
                self._keep(name, tensor)
        return {name: self._tensors[name] for name in tensors}

    def _change(self, name: str, change: torch.Tensor, entry: Mapping[str, Any]) -> None:
        kept = self._tensors.get(name)
        if kept is None or str(kept.dtype).removeprefix("torch.") != entry["dtype"]:
            raise ValueError(f"{name}: nothing in {entry['dtype']} is kept that could be changed")
        self._apply(change, entry["count"], kept)

    def _keep(self, name: str, tensor: torch.Tensor) -> None:
        kept = self._tensors.get(name)
        if kept is None or kept.dtype != tensor.dtype or kept.shape != tensor.shape:
            kept = self._tensors[name] = torch.empty(tensor.shape, dtype=tensor.dtype)
        kept.copy_(tensor)


def wanted() -> KeptWeights | None:
    """None where the trainer sends whole tensors."""
    path = os.environ.get(VARIABLE)
    if path is None:
        return None
    return KeptWeights(runpy.run_path(path)["apply"])
