"""``--custom-generate-function-path spread_generator.SpreadLengths``: Miles' side of ``spread_lengths``."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from spread_lengths import length_of

from miles.core.types.rollout import GenerateFnInput, GenerateFnOutput
from miles.rollout.generators.single_turn import SingleTurn


class SpreadLengths(SingleTurn):
    """Generates exactly as many tokens as were drawn for the sample."""

    async def __call__(self, input: GenerateFnInput) -> GenerateFnOutput:
        return await super().__call__(with_length(input))

    async def together(self, inputs: Sequence[GenerateFnInput]) -> list[GenerateFnOutput]:
        return await super().together([with_length(input) for input in inputs])


def with_length(input: GenerateFnInput) -> GenerateFnInput:
    """The same request, for that many tokens and no fewer."""
    params = {**input.sampling_params, "max_new_tokens": length_of(input.sample.index or 0), "ignore_eos": True}
    return dataclasses.replace(input, sampling_params=params)
