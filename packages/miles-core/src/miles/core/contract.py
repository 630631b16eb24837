"""Contract checks that the author of a plugin runs at home.

Each function returns what is wrong, one sentence per mistake, so that a test reads ``assert check_reward(mine) == []``.
They need neither torch nor any other package of Miles.
"""

from __future__ import annotations

import asyncio
import inspect
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from miles.core import plugins
from miles.core.config import Config
from miles.core.config.discover import build_table, flag_table
from miles.core.config.group import Group
from miles.core.errors import ConfigError, PluginError
from miles.core.registry import Registry
from miles.core.types import DynamicFilterOutput, Sample


def example_sample(**changes: Any) -> Sample:
    """A finished sample with every field that rewards and filters look at."""
    values: dict[str, Any] = {
        "index": 0,
        "group_index": 0,
        "prompt": "What is 1 + 1?",
        "tokens": [1, 2, 3, 4, 5],
        "response": "1 + 1 is 2",
        "response_length": 2,
        "label": "2",
        "reward": 1.0,
        "status": Sample.Status.COMPLETED,
    }
    return Sample(**values | changes)


def check_groups(groups: Sequence[type[Group]]) -> list[str]:
    """A distribution's config groups: flags that are documented, immutable and not those of another group."""
    mine = set(groups)
    others = tuple(group for group in flag_table().groups if group not in mine)
    try:
        table = build_table([("installed packages", others), ("this package", tuple(groups))])
    except PluginError as error:
        return [str(error)]
    return [problem for group in groups for spec in table.of(group) for problem in _check_flag(spec.name, group)]


def check_reward(
    reward: Callable[..., Any], *, config: Config | None = None, sample: Sample | None = None
) -> list[str]:
    """A reward function: called like in a run, it gives a finite number or a mapping, and leaves the sample alone."""
    sample = sample if sample is not None else example_sample()
    before = sample.to_dict()
    try:
        score = reward(config or Config.of(), sample)
        if inspect.isawaitable(score):
            score = asyncio.run(_await(score))
    except Exception as error:
        return [f"called with (args, sample), it raised {type(error).__name__}: {error}"]
    problems = [] if sample.to_dict() == before else ["it changed the sample; return the score instead"]
    if isinstance(score, dict):
        return problems if score else [*problems, "it returned an empty mapping"]
    if isinstance(score, bool) or not isinstance(score, (int, float)) or not math.isfinite(score):
        problems.append(f"it returned {score!r}; expected a finite number or a mapping")
    return problems


def check_filter(filter_: Callable[..., Any], *, config: Config | None = None) -> list[str]:
    """A dynamic sampling filter: called with ``(args, group)``, it says whether to keep the group, and why not."""
    group = [example_sample(index=0, reward=0.0), example_sample(index=1, reward=1.0)]
    try:
        verdict = filter_(config or Config.of(), group)
    except Exception as error:
        return [f"called with (args, group), it raised {type(error).__name__}: {error}"]
    if isinstance(verdict, DynamicFilterOutput):
        return [] if verdict.keep or verdict.reason else ["it drops a group without a reason"]
    return [] if isinstance(verdict, bool) else [f"it returned {verdict!r}; expected DynamicFilterOutput or a bool"]


def check_tracker(tracker: Callable[..., Any], *, config: Config | None = None) -> list[str]:
    """A tracker: constructed with ``(config, run_dir)``, it takes metrics of every kind and can be closed."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            made = tracker(config or Config.of(), Path(folder))
            for kind in ("rollout", "train", "eval"):
                made.log({f"{kind}/value": 1.0}, step=0, kind=kind, rollout_id=0)
            made.close()
        except Exception as error:
            return [f"used like in a run, it raised {type(error).__name__}: {error}"]
    return []


def check_distribution(name: str) -> list[str]:
    """Everything that an installed distribution registers: names are free, objects can be imported."""
    mine = [plugin for plugin in plugins.installed() if plugin.distribution == name]
    problems = [] if mine else [f"{name} is not installed or registers nothing in a group of Miles"]
    for plugin in mine:
        try:
            Registry(plugin.group).get(plugin.name)
        except (PluginError, ConfigError) as error:
            problems.append(str(error))
    return problems


def _check_flag(name: str, group: type[Group]) -> Iterator[str]:
    info = group.model_fields[name]
    if not info.description:
        yield f"{group.__name__}.{name} has no docstring, so its flag has no help"
    if isinstance(info.default, (list, dict, set)):
        yield f"{group.__name__}.{name}: its default can be changed by whoever reads it; use Field(default_factory=...)"


async def _await(value: Any) -> Any:
    return await value
