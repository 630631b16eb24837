"""PyTorch's profiler around parts of training: one trace per rollout, part and rank."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from miles.core.flags.checkpoint import Checkpoint
from miles.core.flags.debug import Debug, ProfileTarget

if TYPE_CHECKING:
    from miles.core.config import Config


class Profiler:
    """Records the parts of ``--profile-target`` on the rollouts from ``--profile-step-start`` on.

    Writes Chrome traces, ``DIR/<part>-<rollout>-rank<n>.json.gz``, which Perfetto and TensorBoard open.  A part within
    one that is recorded already is marked there instead.
    """

    def __init__(self, flags: Debug, directory: Path, rank: int) -> None:
        self._targets = frozenset(flags.profile_target) if flags.use_pytorch_profiler else frozenset()
        self._rollouts = range(flags.profile_step_start, flags.profile_step_end)
        self._directory = directory
        self._rank = rank
        self._recording = False

    @classmethod
    def of(cls, config: Config, rank: int) -> Profiler:
        """As the flags say."""
        flags = config[Debug]
        return cls(flags, Path(flags.profile_dir or Path(config[Checkpoint].save or "") / "profile"), rank)

    @contextmanager
    def part(self, name: ProfileTarget, rollout_id: int) -> Iterator[None]:
        """Record what the block does, if it is to be."""
        if rollout_id not in self._rollouts or not self._targets:
            yield
        elif self._recording or name not in self._targets:
            with torch.profiler.record_function(name):
                yield
        else:
            with self._recorded(name, rollout_id):
                yield

    @contextmanager
    def _recorded(self, name: str, rollout_id: int) -> Iterator[None]:
        self._directory.mkdir(parents=True, exist_ok=True)
        self._recording = True
        try:
            with torch.profiler.profile(record_shapes=True, acc_events=True) as recorder:
                yield
        finally:
            self._recording = False
        recorder.export_chrome_trace(str(self._directory / f"{name}-{rollout_id:07d}-rank{self._rank}.json.gz"))
