"""What a person who reads the metrics of a run closely would say about them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from miles.core.tracking import names

PATIENCE = 2
"""Rollouts in a row that must show something before it is said."""

_TRUNCATED_SHARE = 0.9
_FAILED_SHARE = 0.1
_CLIPPED_SHARE = 0.5
_DISAGREEMENT_NATS = 0.1  # bfloat16 alone stays below a third of it, mixtures of experts included


def advice(latest: Mapping[str, float]) -> Iterator[tuple[str, str]]:
    """Topic and text of what is suspicious about a rollout and its last optimizer step."""
    if latest.get(names.GRAD_NORM) == 0:
        yield (
            "gradient",
            f"the gradient is 0, nothing is learned{_why_no_gradient(latest)} Look at the samples; "
            "--dynamic-sampling-filter-path reward_nonzero_std leaves out groups of equal rewards",
        )
    truncated = latest.get(names.TRUNCATED, 0.0)
    if truncated >= _TRUNCATED_SHARE:
        yield (
            "truncated",
            f"{truncated:.0%} of the responses are cut off: --rollout-max-response-len is too short for them, or the "
            "model does not stop",
        )
    failed = latest.get(names.REWARD_FAILURES, 0.0)
    if failed >= _FAILED_SHARE:
        yield "failed", f"{failed:.0%} of the rewards could not be computed; rollout/reward/category/* says why"
    clipped = latest.get(names.CLIPPED, 0.0)
    if clipped >= _CLIPPED_SHARE:
        yield (
            "clipped",
            f"{clipped:.0%} of the tokens are clipped: --lr may be too high, or the samples too old for the weights",
        )
    apart = latest.get(names.DISAGREEMENT, 0.0)
    if apart >= _DISAGREEMENT_NATS:
        yield (
            "disagreement",
            f"engine and trainer are {apart:.2g} nats apart per token; `miles diagnose` with the run's directory says "
            "why",
        )


def _why_no_gradient(latest: Mapping[str, float]) -> str:
    if latest.get(names.NO_ANSWER) == 1:
        return ": the grader finds no answer in any response. Does the reward fit the way in which the model answers?"
    for name, value in ((names.ALL_ZERO, 0), (names.ALL_ONE, 1)):
        if latest.get(name) == 1:
            return f": every reward is {value}."
    return "."
