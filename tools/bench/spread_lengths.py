"""Response lengths as real rollouts have them: log-normal, 16 to 512 tokens, whatever the model would have said.

``--custom-generate-function-path spread_lengths.generate`` makes Miles' samples of these lengths; other programs draw
the same ones with ``length_of``.
"""

from __future__ import annotations

import dataclasses
import random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from miles.core.types.rollout import GenerateFnInput, GenerateFnOutput

SHORTEST, MEDIAN, LONGEST = 16, 80, 512
SIGMA = 0.9
"""Of the logarithm: one response in six is longer than 200 tokens."""


def length_of(index: int) -> int:
    """Tokens of the sample with this index in the run."""
    drawn = MEDIAN * random.Random(index).lognormvariate(0.0, SIGMA)
    return min(LONGEST, max(SHORTEST, round(drawn)))


async def generate(input: GenerateFnInput) -> GenerateFnOutput:
    """Generate exactly as many tokens as were drawn for the sample."""
    from miles.rollout.generators import single_turn  # the TRL side of the benchmark runs without Miles

    params = {**input.sampling_params, "max_new_tokens": length_of(input.sample.index or 0), "ignore_eos": True}
    return await single_turn.generate(dataclasses.replace(input, sampling_params=params))
