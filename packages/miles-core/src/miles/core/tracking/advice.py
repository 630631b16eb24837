"""What a person who reads the metrics of a run closely would say about them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from miles.core.tracking import names

PATIENCE = 2
"""Rollouts in a row that must show something before it is said."""

_TOO_MUCH = (
    (
        "truncated", names.TRUNCATED, 0.9,
        "{:.0%} of the responses are cut off: --rollout-max-response-len is too short for them, or the model does not "
        "stop",
    ),
    (
        "failed", names.REWARD_FAILURES, 0.1,
        "{:.0%} of the rewards could not be computed; rollout/reward/category/* says why",
    ),
    (
        "clipped", names.CLIPPED, 0.5,
        "{:.0%} of the tokens are clipped: --lr may be too high, or the samples too old for the weights",
    ),
    (
        "disagreement", names.DISAGREEMENT, 0.1,
        "engine and trainer are {:.2g} nats apart per token; `miles diagnose` with the run's directory says why",
    ),
)  # fmt: skip
"""Topic, metric, the least value that is suspicious, by rule of thumb, and what is said of it then."""


def advice(latest: Mapping[str, float]) -> Iterator[tuple[str, str]]:
    """Topic and text of what is suspicious about a rollout and its last optimizer step."""
    if latest.get(names.GRAD_NORM) == 0:
        yield (
            "gradient",
            f"the gradient is 0, nothing is learned{_why_no_gradient(latest)} Look at the samples; "
            "--dynamic-sampling-filter-path reward_nonzero_std leaves out groups of equal rewards",
        )
    for topic, name, least, text in _TOO_MUCH:
        value = latest.get(name, 0.0)
        if value >= least:
            yield topic, text.format(value)


def _why_no_gradient(latest: Mapping[str, float]) -> str:
    if latest.get(names.NO_ANSWER) == 1:
        return ": the grader finds no answer in any response. Does the reward fit the way in which the model answers?"
    for name, value in ((names.ALL_ZERO, 0), (names.ALL_ONE, 1)):
        if latest.get(name) == 1:
            return f": every reward is {value}."
    return "."
