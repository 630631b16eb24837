"""Response lengths as real rollouts have them: log-normal, 16 to 512 tokens, whatever the model would have said."""

from __future__ import annotations

import random

SHORTEST, MEDIAN, LONGEST = 16, 80, 512
SIGMA = 0.9
"""Of the logarithm: one response in six is longer than 200 tokens."""


def length_of(index: int) -> int:
    """Tokens of the sample with this index in the run."""
    drawn = MEDIAN * random.Random(index).lognormvariate(0.0, SIGMA)
    return min(LONGEST, max(SHORTEST, round(drawn)))
