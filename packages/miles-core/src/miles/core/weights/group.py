"""A process group of the trainer's rank 0 and all engines, beside whatever groups either side has of its own.

Made exactly as SGLang makes its own end, so that the two find each other in the store.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _new_process_group_helper, _world

SENDER = 0
"""Rank of the trainer."""


def open_store(host: str, world_size: int, timeout_s: float) -> dist.TCPStore:
    """The meeting point, in the trainer's process, at a free port."""
    timeout = timedelta(seconds=timeout_s)
    return dist.TCPStore(host, 0, world_size, is_master=True, timeout=timeout, wait_for_workers=False)


def reach_store(host: str, port: int, world_size: int, timeout_s: float) -> dist.TCPStore:
    """The trainer's meeting point, from an engine."""
    return dist.TCPStore(host, port, world_size, is_master=False, timeout=timedelta(seconds=timeout_s))


def join(store: dist.Store, *, name: str, rank: int, world_size: int, backend: str, timeout_s: float) -> Any:
    """Return when every member has joined; RuntimeError after ``timeout_s``."""
    group, _ = _new_process_group_helper(
        world_size,
        rank,
        [],
        backend,
        dist.PrefixStore(name, store),
        group_name=name,
        timeout=timedelta(seconds=timeout_s),
    )
    _world.pg_group_ranks[group] = {member: member for member in range(world_size)}
    return group


def has_arrived(store: dist.Store, *, name: str, rank: int) -> bool:
    """Whether a member of a gloo group waits for the others: it leaves its address in the store.

    ``join`` blocks the whole interpreter until everybody is there, so the trainer joins last.
    """
    return bool(store.check([f"{name}/{name}//cpu//0/{rank}"]))


def broadcast(group: Any, tensor: torch.Tensor) -> Any:
    """Begin to send ``tensor`` (rank 0) or to fill it (the others); ``wait()`` on the result ends it."""
    options = dist.BroadcastOptions()
    options.rootRank, options.rootTensor = SENDER, 0
    return group.broadcast([tensor], options)


def leave(group: Any) -> None:
    """Forget the group.  Members that wait in it fail."""
    dist.destroy_process_group(group)
