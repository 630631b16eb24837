"""What watches the actor's training without taking part in it: profiles, memory, dumps, checks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from miles.core.flags.algorithm import Algorithm
from miles.core.flags.data import Data
from miles.core.flags.debug import Debug, ProfileTarget
from miles.core.flags.hooks import Hooks
from miles.core.protocols.backend import Role, TrainReport
from miles.core.training import ci
from miles.core.training.columns import Columns
from miles.core.training.memory import memory_recorder
from miles.core.training.plan import StepPlan
from miles.core.training.profiling import Profiler
from miles.core.training.settings import scoring_packing
from miles.core.training.train_data import write_train_data
from miles.core.types.batch import RolloutBatch

if TYPE_CHECKING:
    from miles.core.config import Config


class Debugging:
    """On one rank, as the flags say."""

    def __init__(self, config: Config, role: Role, rank: int) -> None:
        debug, hooks = config[Debug], config[Hooks]
        self._rank = rank
        self._profiler = Profiler.of(config, rank)
        self._memory = memory_recorder(debug, rank)
        self._train_data = debug.save_debug_train_data
        self._grad_norms = ci.GradNorms(hooks, role)
        self._checks = hooks.ci_test
        # Importance ratios to the engine's policy, or to an older one, are not 1 at the first step; nor, to the last
        # bit, are those between passes over other micro-batches.
        self._same_bits = scoring_packing(config[Data]) is None
        on_policy = self._same_bits and not config[Algorithm].use_rollout_logprobs
        self._checks_first_steps = hooks.ci_test and hooks.ci_kl_checker and on_policy

    @contextmanager
    def rollout(self, rollout_id: int) -> Iterator[None]:
        """Around the training on one rollout."""
        with self.part("train_overall", rollout_id):
            yield
        self._memory.rollout_ended()

    def part(self, name: ProfileTarget, rollout_id: int) -> AbstractContextManager[None]:
        """Around a part of it that can be profiled."""
        return self._profiler.part(name, rollout_id)

    def trained(self, batch: RolloutBatch, columns: Columns, steps: Sequence[StepPlan], report: TrainReport) -> None:
        """After the last optimizer step.  TrainingError when a check of continuous integration fails."""
        if self._train_data is not None:
            path = Path(self._train_data.format(rollout_id=batch.rollout_id, rank=self._rank))
            write_train_data(path, batch, columns, _own_samples(steps), self._rank)
        if self._rank == 0:
            self._grad_norms.take(batch.rollout_id, [step.get("train/grad_norm", 0.0) for step in report.steps])
        first_of_run = batch.rollout_id == 0
        if self._checks:
            ci.check_rollout(batch.rollout_id, first_of_run and self._same_bits, report.metrics)
        if self._checks_first_steps:
            ci.check_first_step(batch.rollout_id, first_of_run, report.steps[0])


def _own_samples(steps: Sequence[StepPlan]) -> list[int]:
    """Positions of this rank's samples; a micro-batch without response tokens only keeps the rank in step."""
    micro_batches = [micro_batch for step in steps for micro_batch in step.micro_batches]
    return sorted({i for micro_batch in micro_batches if micro_batch.layout.num_tokens for i in micro_batch.samples})
