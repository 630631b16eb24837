"""From a group of empty samples to a group of finished, scored ones.  A failing sample harms its group at most."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from typing import Any

from miles.core.errors import EngineError
from miles.core.protocols.reward import RewardDispatcher
from miles.core.types.rollout import GenerateFnInput
from miles.core.types.sample import Group, Sample, Status
from miles.rollout.generate_state import GenerateState
from miles.rollout.generators.adapt import GenerateCall
from miles.rollout.seeds import Stream, sampling_seed

logger = logging.getLogger(__name__)

ATTEMPTS = 2
"""How often a sample that failed is generated from the start before its group is given up."""

_FINISHED = (Status.COMPLETED, Status.TRUNCATED)


@dataclass(frozen=True, slots=True)
class GroupWorker:
    """Generates and scores groups.

    ``slots`` bounds the samples in generation.  ``group_rm``: rewards are given to whole groups.
    """

    state: GenerateState
    generate: GenerateCall
    rewards: RewardDispatcher | None
    slots: asyncio.Semaphore
    group_rm: bool = False
    mask_offpolicy: bool = False

    async def run(self, group: Group, params: dict[str, Any], stream: Stream = "rollout") -> Group:
        """The group's samples, flattened when a generate function makes several of one.

        Samples end COMPLETED or TRUNCATED with a reward, ABORTED when the rollout is being ended, or FAILED.
        """
        outputs = await asyncio.gather(*(self._run_sample(sample, params, stream) for sample in group))
        finished = [sample for output in outputs for sample in output]
        if self.group_rm and self.rewards is not None and all(sample.status in _FINISHED for sample in finished):
            outcomes = await self.rewards.score_group(finished, evaluation=stream == "eval")
            for sample, outcome in zip(finished, outcomes, strict=True):
                outcome.apply(sample)
        return finished

    async def _run_sample(self, sample: Sample, params: dict[str, Any], stream: Stream) -> list[Sample]:
        if sample.status in _FINISHED:  # given back by an earlier rollout, complete
            return [sample]
        if self.mask_offpolicy and sample.response_length:
            sample.loss_mask = [0] * sample.response_length
        for attempt in range(1, ATTEMPTS + 1):
            samples = await self._generate(sample, params, stream)
            if self.state.aborted or not any(made.status is Status.FAILED for made in samples) or attempt == ATTEMPTS:
                break
            sample.reset_for_retry()
        if not self.group_rm:
            await asyncio.gather(*(self._score(made, stream) for made in samples))
        return samples

    async def _generate(self, sample: Sample, params: dict[str, Any], stream: Stream) -> list[Sample]:
        seed = sampling_seed(self.state.args.rollout_seed, sample.index or 0, stream)
        async with self.slots:
            if self.state.aborted:
                sample.status = Status.ABORTED
                return [sample]
            try:
                made = await self.generate(
                    GenerateFnInput(self.state, sample, {**params, "sampling_seed": seed}, evaluation=stream == "eval")
                )
                _identify(made, sample)
            except EngineError as error:
                return [_failed(sample, str(error))]
            except Exception as error:  # a generate function of the user's: the sample is its domain of failure
                logger.warning("sample %s: the generate function failed", sample.index, exc_info=True)
                return [_failed(sample, f"{type(error).__name__}: {error}")]
        return made

    async def _score(self, sample: Sample, stream: Stream) -> None:
        if self.rewards is None or sample.reward is not None or sample.status not in _FINISHED:
            return
        outcome = await self.rewards.score(sample, evaluation=stream == "eval")
        outcome.apply(sample)


def failure(group: Group) -> str | None:
    """Why the first failed sample of the group failed; None when none did."""
    for sample in group:
        if sample.status is Status.FAILED:
            return str(sample.metadata.get("error", "no reason given"))
    return None


def _failed(sample: Sample, error: str) -> Sample:
    sample.status = Status.FAILED
    sample.metadata = {**sample.metadata, "error": error}
    return sample


def _identify(made: list[Sample], origin: Sample) -> None:
    """Check what a generate function returned; several samples of one execution share its identity."""
    for sample in made:
        sample.validate()
        if len(made) > 1:
            sample.group_index, sample.index = origin.group_index, origin.index
            sample.rollout_id = origin.index if sample.rollout_id is None else sample.rollout_id
