"""This engine's end of the process groups over which a trainer broadcasts weights."""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping
from typing import Any

import torch

from miles.core.weights import group as groups
from miles.rollout.engines.embedded.protocol import BadRequest
from miles.rollout.engines.embedded.weights import WeightError, parse_dtype

DEADLINE_S = 300.0
"""For the others to join, and for a tensor to come."""
_FIELDS = ("master_address", "master_port", "rank_offset", "world_size", "group_name")


class WeightGroups:
    """Groups by name."""

    def __init__(self) -> None:
        self._groups: dict[str, Any] = {}
        self._changing = threading.Lock()

    def join(self, body: Mapping[str, Any]) -> None:
        """``/init_weights_update_group``: blocks until all have joined; WeightError when they do not."""
        missing = [name for name in _FIELDS if body.get(name) is None]
        if missing:
            raise BadRequest(f"a group needs {', '.join(_FIELDS)}; {', '.join(missing)} is missing")
        if body.get("backend", "gloo") != "gloo":
            raise BadRequest(
                f"backend is {body['backend']!r}; the embedded engine computes on the CPU and takes 'gloo'"
            )
        name, world_size = str(body["group_name"]), int(body["world_size"])
        if name in self._groups:
            raise BadRequest(f"there is a group {name!r} already; call /destroy_weights_update_group first")
        try:
            store = groups.reach_store(str(body["master_address"]), int(body["master_port"]), world_size, DEADLINE_S)
            joined = groups.join(
                store,
                name=name,
                rank=int(body["rank_offset"]),
                world_size=world_size,
                backend="gloo",
                timeout_s=DEADLINE_S,
            )
        except (RuntimeError, ValueError) as error:
            raise WeightError(f"cannot join the group {name!r}: {error}") from error
        with self._changing:
            self._groups[name] = joined

    def leave(self, body: Mapping[str, Any]) -> None:
        """``/destroy_weights_update_group``"""
        with self._changing:
            found = self._groups.pop(str(body.get("group_name")), None)
        if found is None:
            raise WeightError(f"there is no group {body.get('group_name')!r}")
        groups.leave(found)

    def announced(self, body: Mapping[str, Any]) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
        """Names, dtypes and shapes of the tensors that are about to come; BadRequest for something else."""
        try:
            names, dtypes, shapes = body["names"], body["dtypes"], body["shapes"]
            columns = zip(names, dtypes, shapes, strict=True)
            return [(str(name), parse_dtype(dtype), tuple(map(int, shape))) for name, dtype, shape in columns]
        except (KeyError, TypeError, ValueError) as error:
            raise BadRequest(f"names, dtypes and shapes must be lists of one length ({error!r})") from error

    def receive(
        self, name: str, announced: list[tuple[str, torch.dtype, tuple[int, ...]]]
    ) -> list[tuple[str, torch.Tensor]]:
        """Take part in the broadcast of the announced tensors."""
        group = self._groups.get(name)
        if group is None:
            raise WeightError(f"there is no group {name!r}; call /init_weights_update_group first")
        tensors = [(tensor, torch.empty(shape, dtype=dtype)) for tensor, dtype, shape in announced]
        works = [groups.broadcast(group, tensor) for _, tensor in tensors if math.prod(tensor.shape)]
        try:
            for work in works:
                work.wait()
        except RuntimeError as error:
            raise WeightError(f"the broadcast over group {name!r} failed: {error}") from error
        return tensors
