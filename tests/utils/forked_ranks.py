"""Ranks as real processes, forked so that nothing is imported twice.  For the tests of trainers."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import pickle
import signal
import socket
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from miles.core.protocols.backend import Rank

_MEETING_DEADLINE_S = 60.0
_TELL_WHERE = signal.SIGUSR1
"""A rank writes what it is doing."""
_TELLING_S = 1.0


def run_on_ranks(count: int, function: Callable[[Rank], Any], directory: Path, deadline_s: float = 120.0) -> list[Any]:
    """``function(rank)`` in ``count`` processes; their results in rank order.  ``directory`` is for scratch files."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        master = f"127.0.0.1:{probe.getsockname()[1]}"
    meeting = multiprocessing.get_context("fork").Barrier(count)
    ranks = [Rank(rank=number, world_size=count, local_rank=number, master=master) for number in range(count)]
    results = [directory / f"result-{number}" for number in range(count)]
    children = {_child(function, *each, meeting): each[0].rank for each in zip(ranks, results, strict=True)}
    failed = _ended(children, time.monotonic() + deadline_s)
    assert not failed, f"ranks {failed} failed"
    return [pickle.loads(result.read_bytes()) for result in results]


def _child(function: Callable[[Rank], Any], rank: Rank, result: Path, meeting: Any) -> int:
    pid = os.fork()
    if pid:
        return pid
    status = 1
    faulthandler.register(_TELL_WHERE, file=2)
    try:
        _leave_together(meeting)
        result.write_bytes(pickle.dumps(function(rank)))
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def _leave_together(meeting: Any) -> None:
    """Let nobody join a second group before all have left the first: its address is the same, and still answers."""
    destroy = dist.destroy_process_group

    def leave(*group: Any, **named_group: Any) -> None:
        destroy(*group, **named_group)
        if not group and not named_group:
            meeting.wait(_MEETING_DEADLINE_S)

    dist.destroy_process_group = leave


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
