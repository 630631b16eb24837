"""What can be wrong with the reward flags, found before a process starts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from miles.core.errors import PluginError
from miles.core.flags.reward import Reward
from miles.core.registry import Registry
from miles.rewards.catalogue import BOXED, GROUP
from miles.rewards.flags import RewardExecution
from miles.rewards.grader import Grader
from miles.rewards.mix import Part, parse_mix
from miles.rewards.types.remote import problem_with

if TYPE_CHECKING:
    from miles.core.config import Config

_CATEGORIES = (
    *("timeout", "crash", "error", "bad_label", "bad_score", "too_long", "remote_error"),
    *("no_answer", "unparsable", "ambiguous", "wrong"),
)


def problems(config: Config) -> Iterator[str]:
    """One sentence per mistake."""
    reward = config[Reward]
    yield from _failure_values(config[RewardExecution])
    if reward.rm_type is None or reward.custom_rm_path is not None:
        return
    parts = parse_mix(reward.rm_type)
    registry = Registry(GROUP)
    for part in parts:
        yield from _part(part, registry, reward, alone=len(parts) == 1)


def _part(part: Part, registry: Registry, reward: Reward, *, alone: bool) -> Iterator[str]:
    name = part.name if part.name in registry else part.name.removeprefix(BOXED)
    try:
        grader = registry.get(name)
    except PluginError as error:
        yield f"--rm-type {reward.rm_type}: {error}"
        return
    if not callable(grader):
        yield f"--rm-type {reward.rm_type}: {name} is a {type(grader).__name__}, not a function"
    if isinstance(grader, Grader) and (missing := grader.missing):
        yield f"--rm-type {reward.rm_type}: {missing}"
    if name == "remote_rm" and (problem := problem_with(reward.rm_url)):
        yield problem
    if alone and isinstance(grader, Grader) and grader.keys:
        for flag, key in (("--reward-key", reward.reward_key), ("--eval-reward-key", reward.eval_reward_key)):
            if key not in grader.keys:
                yield (
                    f"{flag} is {key!r}, but --rm-type {name} gives rewards with the entries "
                    f"{', '.join(grader.keys)}. Set {flag} {grader.keys[0]}"
                )


def _failure_values(execution: RewardExecution) -> Iterator[str]:
    for category in execution.rm_failure_values:
        if category not in _CATEGORIES:
            yield f"--rm-failure-values: {category!r} is no category. Those are {', '.join(_CATEGORIES)}"
