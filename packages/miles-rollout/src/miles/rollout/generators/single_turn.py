"""One prompt, one response: the default generate function."""

from __future__ import annotations

from collections.abc import Sequence

from miles.core.types.rollout import GenerateFnInput, GenerateFnOutput
from miles.rollout.generators.request import generate, payload, prepare
from miles.rollout.generators.response import append_response


class SingleTurn:
    """Generates a response, or the rest of one that was cut by an abort."""

    resumes = True

    async def __call__(self, input: GenerateFnInput) -> GenerateFnOutput:
        """One sample, one request."""
        await generate(input)
        return GenerateFnOutput(input.sample)

    async def together(self, inputs: Sequence[GenerateFnInput]) -> list[GenerateFnOutput]:
        """Several samples, one request: a group costs one passage through client, router and server."""
        prepared = [(input.sample, params) for input in inputs if (params := prepare(input)) is not None]
        if prepared:
            state = inputs[0].state
            ids = [sample.tokens for sample, _ in prepared]
            answers = await state.client.post("/generate", payload(state, ids, [params for _, params in prepared]))
            for (sample, _), answer in zip(prepared, answers, strict=True):
                append_response(sample, answer, state.experts)
        return [GenerateFnOutput(input.sample) for input in inputs]
