"""Ranks as real processes, forked so that nothing is imported twice.  For the tests of trainers."""

from __future__ import annotations

import faulthandler
import itertools
import os
import pickle
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from miles.core.protocols.backend import Rank

_TELL_WHERE = signal.SIGUSR1
"""A rank writes what it is doing."""
_TELLING_S = 1.0


def run_on_ranks(count: int, function: Callable[[Rank], Any], directory: Path, deadline_s: float = 120.0) -> list[Any]:
    """``function(rank)`` in ``count`` processes; their results in rank order.  ``directory`` is for scratch files."""
    meetings = Path(tempfile.mkdtemp(prefix="meetings-", dir=directory))
    ranks = [Rank(rank=number, world_size=count, local_rank=number, master="nobody:1") for number in range(count)]
    results = [directory / f"result-{number}" for number in range(count)]
    children = {_child(function, *each, meetings): each[0].rank for each in zip(ranks, results, strict=True)}
    failed = _ended(children, time.monotonic() + deadline_s)
    assert not failed, f"ranks {failed} failed"
    return [pickle.loads(result.read_bytes()) for result in results]


def _child(function: Callable[[Rank], Any], rank: Rank, result: Path, meetings: Path) -> int:
    pid = os.fork()
    if pid:
        return pid
    status = 1
    faulthandler.register(_TELL_WHERE, file=2)
    try:
        _meet_in(meetings)
        result.write_bytes(pickle.dumps(function(rank)))
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def _meet_in(directory: Path) -> None:
    """Let ranks find each other by a file of its own for each group that they make, rather than at ``Rank.master``.

    Who makes a second group in one process would find the store of the first at that address, as long as anything of
    the first is alive, and in it addresses of members that have left.
    """
    join, numbers = dist.init_process_group, itertools.count()

    def meet(backend: str, *, init_method: str | None = None, **named: Any) -> None:
        if init_method is not None:
            named["store"] = dist.FileStore(str(directory / str(next(numbers))), named["world_size"])
        join(backend, **named)

    dist.init_process_group = meet


def _ended(children: dict[int, int], deadline: float) -> list[int]:
    """Wait for all; ranks that failed.  When one does, or the deadline passes, the others say where they are and are
    killed."""
    failed = []
    while children:
        for pid, rank in list(children.items()):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                del children[pid]
                failed += [rank] if status else []
        if failed or time.monotonic() > deadline:
            for pid in children:
                os.kill(pid, _TELL_WHERE)
            time.sleep(_TELLING_S if children else 0.0)
            for pid, rank in children.items():
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                failed.append(rank)
            return failed
        time.sleep(0.005)
    return failed
