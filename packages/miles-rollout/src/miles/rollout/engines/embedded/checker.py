"""``/weights_checker``: proof of what the engine holds."""

from __future__ import annotations

import zlib
from typing import Any

import torch

from miles.rollout.engines.embedded.weights import WeightError, WeightStore

_SEED = 20_000


class WeightsChecker:
    """Checksums, and the comparison of the weights before and after an update that should change nothing."""

    def __init__(self, weights: WeightStore) -> None:
        self._weights = weights
        self._snapshot: dict[str, torch.Tensor] | None = None

    def run(self, action: str) -> dict[str, Any]:
        """Do ``checksum``, ``snapshot``, ``reset_tensors`` or ``compare``; raise WeightError when it fails."""
        actions = {
            "checksum": self._checksum,
            "snapshot": self._take_snapshot,
            "reset_tensors": self._reset,
            "compare": self._compare,
        }
        if action not in actions:
            raise WeightError(f"action is {action!r}; it must be one of {', '.join(actions)}")
        return {"success": True, "message": "", **actions[action]()}

    def _checksum(self) -> dict[str, Any]:
        checksums = {name: self._weights.checksum(name) for name in self._weights.names()}
        whole = zlib.crc32("".join(f"{name}:{value};" for name, value in sorted(checksums.items())).encode())
        return {"ranks": [{"checksums": checksums}], "per_engine_checksum": f"{whole:08x}"}

    def _take_snapshot(self) -> dict[str, Any]:
        self._snapshot = {name: self._weights.read(name).clone() for name in self._weights.names()}
        return {}

    def _reset(self) -> dict[str, Any]:
        """Fill every tensor that updates bring with noise, so that an update that misses one is seen."""
        generator = torch.Generator().manual_seed(_SEED)
        for name in self._weights.updated_names():
            held = self._weights.read(name)
            self._weights.write(name, torch.randn(held.shape, generator=generator).to(held.dtype))
        return {}

    def _compare(self) -> dict[str, Any]:
        if self._snapshot is None:
            raise WeightError("there is no snapshot to compare with; call the action 'snapshot' first")
        different = [
            name for name, tensor in self._snapshot.items() if not torch.equal(self._weights.read(name), tensor)
        ]
        if different:
            raise WeightError(f"{len(different)} tensors differ from the snapshot: {', '.join(different[:20])}")
        return {}
