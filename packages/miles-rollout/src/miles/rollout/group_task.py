"""From a group of empty samples to a group of finished, scored ones.  A failing sample harms its group at most."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any

from miles.core.errors import EngineError
from miles.core.protocols.reward import RewardDispatcher
from miles.core.types.rollout import GenerateFnInput, GenerateFnOutput
from miles.core.types.sample import Group, Sample, Status
from miles.rollout.generate_state import GenerateState
from miles.rollout.generators.adapt import Together, as_list
from miles.rollout.generators.registry import Generators
from miles.rollout.progress import Progress
from miles.rollout.seeds import Stream, sampling_seed
from miles.rollout.slots import Slots
from miles.rollout.teacher import Teacher

logger = logging.getLogger(__name__)

MAX_IDLE_CUTS = 8
"""Engines may cut a response any number of times, as long as some of the cuts bring tokens."""

_ERROR = "error"
"""Entry of a failed sample's metadata."""
_FINISHED = (Status.COMPLETED, Status.TRUNCATED)


@dataclass(frozen=True, slots=True)
class GroupWorker:
    """Generates and scores groups.

    ``slots`` bounds the samples in generation.  ``whole_groups``: a group goes to the engines in one request where its
    generate function can do that.  ``group_rm``: rewards are given to whole groups.
    """

    state: GenerateState
    generators: Generators
    rewards: RewardDispatcher | None
    slots: Slots
    whole_groups: bool = True
    group_rm: bool = False
    mask_offpolicy: bool = False
    teacher: Teacher | None = None
    """Scores the finished samples of training, where the policy is distilled."""
    retries: int = 1
    """Times that a sample whose generation failed is generated again, from the start."""
    progress: Progress = field(default_factory=Progress)

    async def run(self, group: Group, params: dict[str, Any], stream: Stream = "rollout") -> Group:
        """The group's samples, flattened when a generate function makes several of one.

        Samples end COMPLETED or TRUNCATED with a reward, ABORTED when the rollout is being ended, or FAILED.  A sample
        that an engine cut for reasons of its own is gone on with.
        """
        # Complete samples were given back by an earlier rollout, or come from a checkpoint, scored or not.
        complete = [sample for sample in group if sample.status in _FINISHED]
        for sample in group if self.mask_offpolicy else ():
            sample.loss_mask = [0] * sample.response_length if sample.response_length else sample.loss_mask
        missing = [self._input(sample, params, stream) for sample in group if sample.status not in _FINISHED]
        self.progress.begun += len(missing)
        together = self.generators.together(group) if self.whole_groups and len(missing) > 1 else None
        if together is not None:
            await self._generate_together(together, missing)
        if together is not None and all(input.sample.status in _FINISHED for input in missing):
            made = await self._complete_together(missing)
        else:
            made = await asyncio.gather(*(self._finish(input, generated=together is not None) for input in missing))
        await asyncio.gather(*(self._complete([sample], evaluation=stream == "eval") for sample in complete))
        outputs = {id(input.sample): samples for input, samples in zip(missing, made, strict=True)}
        finished = [made for sample in group for made in outputs.get(id(sample), [sample])]
        if self.group_rm:
            await self._score_group(finished, stream)
        return finished

    def _input(self, sample: Sample, params: dict[str, Any], stream: Stream) -> GenerateFnInput:
        seed = sampling_seed(self.state.args.rollout_seed, sample.index or 0, stream)
        return GenerateFnInput(self.state, sample, {**params, "sampling_seed": seed}, evaluation=stream == "eval")

    async def _finish(self, input: GenerateFnInput, *, generated: bool) -> list[Sample]:
        """Generate what is not generated yet or failed, and score it."""
        output = GenerateFnOutput(input.sample) if generated else await self._generate(input)
        output = await self._continued(input, output)
        for _ in range(self.retries):
            if self.state.aborted or failure(as_list(output.samples)) is None:
                break
            self.progress.retried += 1
            _start_again(input.sample)
            output = await self._continued(input, await self._generate(input))
        samples = as_list(output.samples)
        await self._complete(samples, shared=output.shared_reward, evaluation=input.evaluation)
        self.progress.finished += 1
        return samples

    async def _complete_together(self, inputs: list[GenerateFnInput]) -> list[list[Sample]]:
        """Score samples that were all generated at once: a group costs one passage through the rewards, too."""
        samples = [input.sample for input in inputs]
        await self._complete(samples, evaluation=inputs[0].evaluation)
        self.progress.finished += len(samples)
        return [[sample] for sample in samples]

    async def _complete(self, samples: list[Sample], *, shared: bool = False, evaluation: bool) -> None:
        """Give finished samples their rewards, and the teacher's scores."""
        works = []
        if self.rewards is not None and not self.group_rm:
            works.append(self._score_execution(samples, shared=shared, evaluation=evaluation))
        if self.teacher is not None and not evaluation:
            works += [self._teach(sample) for sample in samples if sample.status in _FINISHED]
        await _all(works)

    async def _continued(self, input: GenerateFnInput, output: GenerateFnOutput) -> GenerateFnOutput:
        """Go on with what was cut though nobody here asked for it: by another client, or for a weight update."""
        sample, idle_cuts = input.sample, 0
        while not self.state.aborted and any(made.status is Status.ABORTED for made in as_list(output.samples)):
            if not self.generators.of(sample).resumes:
                return GenerateFnOutput(_failed(sample, "the response was cut, and nothing can go on with it"))
            if idle_cuts == MAX_IDLE_CUTS:
                return GenerateFnOutput(_failed(sample, f"the engine cut the response {MAX_IDLE_CUTS} times in a row"))
            self.progress.resumed += 1
            before = sample.response_length
            output = await self._generate(input)
            idle_cuts = 0 if sample.response_length > before else idle_cuts + 1
        return output

    async def _generate(self, input: GenerateFnInput) -> GenerateFnOutput:
        sample = input.sample
        async with self.slots.take():
            if self.state.aborted:
                sample.status = Status.ABORTED
                return GenerateFnOutput(sample)
            try:
                made = await self.generators.of(sample).one(input)
                _identify(as_list(made.samples), sample)
            except EngineError as error:
                return GenerateFnOutput(_failed(sample, str(error)))
            except Exception as error:  # a generate function of the user's: the sample is its domain of failure
                logger.warning("sample %s: the generate function failed", sample.index, exc_info=True)
                return GenerateFnOutput(_failed(sample, f"{type(error).__name__}: {error}"))
        return made

    async def _generate_together(self, together: Together, inputs: list[GenerateFnInput]) -> None:
        async with self.slots.take(len(inputs)):
            if self.state.aborted:
                for input in inputs:
                    input.sample.status = Status.ABORTED
                return
            try:
                for input, output in zip(inputs, await together(inputs), strict=True):
                    assert output.samples is input.sample, "samples that are generated together are changed in place"
                    input.sample.validate()
            except EngineError as error:
                for input in inputs:
                    _failed(input.sample, str(error))

    async def _score_execution(self, samples: Group, *, shared: bool, evaluation: bool) -> None:
        """Score what has no reward yet; of a shared reward, the last sample's is that of all."""
        unscored = [made for made in samples if made.reward is None and made.status in _FINISHED]
        graded = unscored[-1:] if shared else unscored
        await self._score(graded, evaluation=evaluation)
        if shared and graded:
            for sample in unscored[:-1]:
                sample.reward, sample.remove_sample = graded[0].reward, graded[0].remove_sample

    async def _score(self, samples: Group, *, evaluation: bool) -> None:
        assert self.rewards is not None
        if len(samples) == 1:
            outcomes = [await self.rewards.score(samples[0], evaluation=evaluation)]
        else:
            outcomes = await self.rewards.score_group(samples, evaluation=evaluation) if samples else []
        for sample, outcome in zip(samples, outcomes, strict=True):
            outcome.apply(sample)

    async def _teach(self, sample: Sample) -> None:
        """Let the teacher score what it has not scored yet."""
        assert self.teacher is not None
        if sample.teacher_log_probs is not None:
            return
        try:
            await self.teacher.score(sample)
        except EngineError as error:
            _failed(sample, str(error))

    async def _score_group(self, group: Group, stream: Stream) -> None:
        """Judge it as a whole.  If samples failed, an evaluation takes what is left of it, training nothing."""
        finished = [sample for sample in group if sample.status in _FINISHED]
        if self.rewards is not None and (len(finished) == len(group) or stream == "eval"):
            await self._score(finished, evaluation=stream == "eval")


async def _all(works: list[Coroutine[Any, Any, None]]) -> None:
    """Do all at once, and end them when one fails; a single one needs no task of its own."""
    if len(works) == 1:
        await works[0]
        return
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


def failure(group: Group) -> str | None:
    """Why the first failed sample of the group failed; None when none did."""
    for sample in group:
        if sample.status is Status.FAILED:
            return str(sample.metadata.get(_ERROR, "no reason given"))
    return None


def _start_again(sample: Sample) -> None:
    sample.reset_for_retry()
    sample.metadata = {name: value for name, value in sample.metadata.items() if name != _ERROR}


def _failed(sample: Sample, error: str) -> Sample:
    sample.status = Status.FAILED
    sample.metadata = {**sample.metadata, _ERROR: error}
    return sample


def _identify(made: list[Sample], origin: Sample) -> None:
    """Check what a generate function returned; several samples of one execution share its identity."""
    for sample in made:
        sample.validate()
        if len(made) > 1:
            sample.group_index, sample.index = origin.group_index, origin.index
            sample.rollout_id = origin.index if sample.rollout_id is None else sample.rollout_id
