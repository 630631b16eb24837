"""Several agents of one model, with rewards of their own, on ``scales.py``'s task.

    --custom-generate-function-path scales_council.generate --n-samples-per-prompt 4

Three solvers answer at the same time; a judge reads their answers and gives its own.  Every agent's turn is a sample of
the execution.  A solver is rewarded for being right, and a little for a judge that is; the judge for being right.
"""

from __future__ import annotations

import asyncio
from copy import deepcopy

from miles.core.types.rollout import GenerateFnInput, GenerateFnOutput
from miles.core.types.sample import Sample, Status
from miles.rollout.generators.request import generate as ask

SOLVERS = 3
TEAM_SHARE = 0.2
"""Of a solver's reward, what it gets for the judge's answer."""


async def generate(input: GenerateFnInput) -> GenerateFnOutput:
    """``--custom-generate-function-path``"""
    solvers = [_agent(input, number) for number in range(SOLVERS)]
    await asyncio.gather(*(ask(solver) for solver in solvers))
    answers = [_answer(solver.sample) for solver in solvers]
    judge = _agent(input, SOLVERS, f"Some say: {', '.join(answers)}. ")
    await ask(judge)
    made = [turn.sample for turn in (*solvers, judge)]
    if any(sample.status is Status.ABORTED for sample in made):
        input.sample.status = Status.ABORTED  # nothing of it is kept: the execution starts anew
        return GenerateFnOutput(input.sample)
    verdict = _right(judge.sample)
    for sample in made[:-1]:
        sample.reward = (1 - TEAM_SHARE) * _right(sample) + TEAM_SHARE * verdict
    judge.sample.reward = verdict
    return GenerateFnOutput(made)


def _agent(input: GenerateFnInput, number: int, words: str = "") -> GenerateFnInput:
    """An agent's own sample and seed; ``words`` come before the question."""
    sample: Sample = deepcopy(input.sample)
    assert isinstance(sample.prompt, list), "the agents get messages: leave --apply-chat-template out"
    sample.prompt = [*sample.prompt[:-1], {"role": "user", "content": words + sample.prompt[-1]["content"]}]
    sample.metadata["agent"] = number
    params = input.sampling_params
    seed = (params.get("sampling_seed", 0) + 7919 * number) % 2**31
    return GenerateFnInput(input.state, sample, {**params, "sampling_seed": seed}, input.evaluation)


def _answer(sample: Sample) -> str:
    return sample.response.removesuffix("<|im_end|>").strip()


def _right(sample: Sample) -> float:
    return float(_answer(sample) == str(sample.label))
