"""From how well each explanation fits to a verdict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from miles.core.diagnosis.samples import Floats, Recorded

AGREE_BELOW = 2e-4
"""Mean absolute difference of log-probabilities that nothing needs to explain."""
_EXPLAINED = 0.2
"""An explanation must leave less than this part of the difference."""
_ROUNDING_FACTOR = 3.0
"""What rounding does to these weights in bfloat16, times this, counts as precision."""


class Cause(StrEnum):
    """Why log-probabilities differ."""

    AGREE = "they agree"
    STALE_VERSION = "stale version"
    TEMPERATURE = "temperature"
    TRUNCATION = "truncated support"
    TEMPLATE = "template shift"
    PRECISION = "precision"
    WRONG_WEIGHTS = "wrong weights"


@dataclass(frozen=True, slots=True)
class Fit:
    """One explanation, and what difference it leaves."""

    cause: Cause
    says: str
    mean: float
    """Mean absolute difference over sampled tokens."""
    largest: float
    share: float
    """Tokens that differ by more than 0.1."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What ``miles diagnose`` prints.  ``fits``: the trainer's own first, then by what they leave."""

    cause: Cause
    why: str
    fits: tuple[Fit, ...]

    def text(self) -> str:
        rows = [f"  {'mean |diff|':>11}  {'largest':>9}  {'> 0.1':>6}  explanation"]
        rows += [f"  {fit.mean:11.2e}  {fit.largest:9.2e}  {fit.share:6.1%}  {fit.says}" for fit in self.fits]
        return "\n".join([f"verdict: {self.cause.value}", self.why, "", "engine against the trainer's model:", *rows])


def fit(cause: Cause, says: str, samples: Sequence[Recorded], scores: Sequence[Floats]) -> Fit:
    """How far ``scores`` are from what the engine returned."""
    parts = [np.abs(score - sample.logps)[sample.sampled] for sample, score in zip(samples, scores, strict=True)]
    differences = np.concatenate(parts)
    share = float((differences > 0.1).mean())
    return Fit(cause, says, float(differences.mean()), float(differences.max()), share)


def decide(own: Fit, others: Sequence[Fit], rounding: float) -> Verdict:
    """``own``: under the trainer's weights and settings.  ``rounding``: mean difference that bfloat16 makes."""
    ordered = sorted(others, key=lambda other: other.mean)
    fits = (own, *ordered[:8])
    if own.mean < AGREE_BELOW:
        return Verdict(Cause.AGREE, "The trainer's model gives the tokens the engine's log-probabilities.", fits)
    best = ordered[0] if ordered else own
    if best.mean < _EXPLAINED * own.mean and best.mean < max(AGREE_BELOW, _ROUNDING_FACTOR * rounding):
        return Verdict(best.cause, f"The engine's log-probabilities are those of: {best.says}.", fits)
    if own.mean < _ROUNDING_FACTOR * rounding:
        why = f"Rounding these weights and activations to bfloat16 alone makes a mean difference of {rounding:.1e}."
        return Verdict(Cause.PRECISION, why, fits)
    why = (
        "Nothing else that was tried explains the difference: the engine held other weights than every version that "
        "could be loaded, or served another model."
    )
    return Verdict(Cause.WRONG_WEIGHTS, why, fits)
