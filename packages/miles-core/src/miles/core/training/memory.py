"""Where memory goes: the accelerator's allocator, or the whole process under memray."""

from __future__ import annotations

import atexit
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

import torch

from miles.core.flags.debug import Debug


class MemoryRecorder(Protocol):
    """Told of the end of every rollout."""

    def rollout_ended(self) -> None: ...


class NoRecorder:
    """Records nothing."""

    def rollout_ended(self) -> None:
        """Nothing to do."""


class AllocatorHistory:
    """The history of the CUDA allocator, as https://pytorch.org/memory_viz shows it.

    Written after ``num_rollouts``; without a number after every rollout, in the place of the last one.
    """

    def __init__(self, path: Path, num_rollouts: int | None) -> None:
        self._path, self._num_rollouts = path, num_rollouts
        self._ended = 0
        torch.cuda.memory._record_memory_history()

    def rollout_ended(self) -> None:
        self._ended += 1
        if self._num_rollouts is None or self._ended == self._num_rollouts:
            torch.cuda.memory._dump_snapshot(str(self._path))
        if self._ended == self._num_rollouts:
            torch.cuda.memory._record_memory_history(enabled=None)


class ProcessHistory:
    """Every allocation of this process, as ``memray flamegraph`` reads it, until ``num_rollouts`` or the end."""

    def __init__(self, path: Path, num_rollouts: int | None) -> None:
        import memray  # optional, and present when the flag passed its check

        path.unlink(missing_ok=True)  # memray refuses to replace a file
        self._tracker: AbstractContextManager[object] | None = memray.Tracker(path, native_traces=True)
        self._left = num_rollouts
        self._tracker.__enter__()
        atexit.register(self._stop)

    def rollout_ended(self) -> None:
        if self._left is not None:
            self._left -= 1
            if self._left == 0:
                self._stop()

    def _stop(self) -> None:
        tracker, self._tracker = self._tracker, None
        if tracker is not None:
            tracker.__exit__(None, None, None)


def allocated_bytes() -> int:
    """Of this process's accelerator; 0 where it uses none."""
    return int(torch.cuda.memory_allocated()) if torch.cuda.is_initialized() else 0


def memory_recorder(flags: Debug, rank: int) -> MemoryRecorder:
    """What ``--record-memory-history`` and ``--memory-recorder`` ask for."""
    if not flags.record_memory_history:
        return NoRecorder()
    directory = Path(flags.memory_snapshot_dir)
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"rank{rank}_{flags.memory_snapshot_path}"
    if flags.memory_recorder == "memray":
        return ProcessHistory(path, flags.memory_snapshot_num_steps)
    return AllocatorHistory(path, flags.memory_snapshot_num_steps)
