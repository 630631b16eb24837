"""Learning rate as a function of the number of optimizer steps done."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

DecayStyle = Literal["constant", "linear", "cosine", "inverse-square-root", "WSD"]
AnnealStyle = Literal["linear", "cosine", "exponential", "minus_sqrt"]

# How much of the range between the minimum and the peak is left after a share r of the decay.
_REMAINING: Mapping[str, Callable[[float], float]] = {
    "linear": lambda r: 1.0 - r,
    "cosine": lambda r: 0.5 * (1.0 + math.cos(math.pi * r)),
    "exponential": lambda r: 2.0 * 0.5**r - 1.0,
    "minus_sqrt": lambda r: 1.0 - math.sqrt(r),
}


@dataclass(frozen=True, slots=True)
class LearningRate:
    """Linear warm-up from ``warmup_init`` to ``peak``, then decay to ``minimum``.

    All lengths count optimizer steps.  ``decay_steps`` is where the decay ends, warm-up included; every style but
    ``constant`` and ``inverse-square-root`` needs it.  ``WSD`` holds the peak and anneals over the last
    ``anneal_steps``.
    """

    peak: float
    style: DecayStyle = "constant"
    minimum: float = 0.0
    warmup_steps: int = 0
    warmup_init: float = 0.0
    decay_steps: int | None = None
    anneal_steps: int = 0
    anneal_style: AnnealStyle = "exponential"

    def at(self, steps_done: int) -> float:
        """Learning rate of the step that follows ``steps_done`` steps."""
        if steps_done < self.warmup_steps:
            return self.warmup_init + (self.peak - self.warmup_init) * steps_done / self.warmup_steps
        if self.style == "constant":
            return self.peak
        if self.style == "inverse-square-root":
            if self.decay_steps is not None and steps_done > self.decay_steps:
                return self.minimum
            shrink = math.sqrt(max(self.warmup_steps, 1) / max(steps_done, 1))
            return max(self.minimum, self.peak * min(shrink, 1.0))
        return self.minimum + (self.peak - self.minimum) * self._remaining(steps_done)

    def agrees(self, other: LearningRate, *, since: int) -> bool:
        """Whether both give the same rates from ``since`` steps on, as far as one of them changes."""
        ends = [schedule.decay_steps or schedule.warmup_steps for schedule in (self, other)]
        return self == other or all(self.at(step) == other.at(step) for step in range(since, max(since, *ends) + 1))

    def _remaining(self, steps_done: int) -> float:
        if self.decay_steps is None:
            raise ValueError(f"a {self.style} schedule needs the number of steps over which it decays")
        start = self.decay_steps - self.anneal_steps if self.style == "WSD" else self.warmup_steps
        if steps_done <= start:
            return 1.0
        if steps_done >= self.decay_steps:
            return 0.0
        curve = self.anneal_style if self.style == "WSD" else self.style
        return _REMAINING[curve]((steps_done - start) / (self.decay_steps - start))
