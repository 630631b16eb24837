"""Installed plugins: entry points of Miles' groups, listed without importing anything."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points

from miles.core import environ

OWN_DISTRIBUTIONS = (
    "miles-core",
    "miles-router",
    "miles-rollout",
    "miles-rewards",
    "miles-fsdp",
    "miles-megatron",
)

# Which of our distributions provides a name, so that a missing one can be told by its name alone.
WELL_KNOWN: Mapping[str, Mapping[str, str]] = {
    "miles.train_backends": {"fsdp": "miles-fsdp", "megatron": "miles-megatron"},
    "miles.roles": {"rollout": "miles-rollout"},
    "miles.engines": {"embedded": "miles-rollout[embedded]", "sglang": "miles-rollout"},
    "miles.rollouts": {"sglang": "miles-rollout", "sft": "miles-rollout"},
    "miles.generators": {"single_turn": "miles-rollout"},
    "miles.data_sources": {"buffered": "miles-rollout"},
    "miles.filters": {"reward_nonzero_std": "miles-rollout", "pop_first": "miles-rollout"},
    "miles.rewards": dict.fromkeys(
        ("math", "dapo", "deepscaler", "f1", "gpqa", "random", "reasoning_gym", "remote_rm"), "miles-rewards"
    ),
    "miles.reward_dispatchers": {"default": "miles-rewards"},
    "miles.routers": {"miles": "miles-router"},
}


@dataclass(frozen=True, slots=True)
class Plugin:
    """One registered name."""

    group: str
    name: str
    target: str
    """``module:attribute``."""
    distribution: str
    version: str

    def __str__(self) -> str:
        return f"{self.distribution} {self.version} ({self.target})"


def installed(group: str | None = None) -> list[Plugin]:
    """Plugins of ``group``, or of every group of Miles, sorted by group and name.

    With ``MILES_DISABLE_PLUGINS=1`` only those of Miles' own distributions.
    """
    plugins = _registered(group, _search_path())
    if environ.plugins_disabled():
        plugins = [plugin for plugin in plugins if plugin.distribution in OWN_DISTRIBUTIONS]
    return list(plugins)


_SearchPath = tuple[tuple[str, int], ...]
"""Where distributions are looked for, and when each place changed last: it does when one is installed or removed."""


def _search_path() -> _SearchPath:
    return tuple((place, _changed_ns(place)) for place in sys.path)


def _changed_ns(place: str) -> int:
    try:
        return os.stat(place or os.curdir).st_mtime_ns
    except OSError:
        return 0


@lru_cache(maxsize=64)  # of one search path, all groups: a run asks dozens of times
def _registered(group: str | None, where: _SearchPath) -> list[Plugin]:
    every = _read(where)
    groups = [name for name in every if name.startswith("miles.")] if group is None else [group]
    plugins = {_plugin(entry) for name in groups for entry in every.get(name, ())}
    return sorted(plugins, key=lambda plugin: (plugin.group, plugin.name, plugin.distribution))


@lru_cache(maxsize=1)
def _read(where: _SearchPath) -> dict[str, list[EntryPoint]]:
    """All that is installed, by group.  The files of every distribution are read, which takes about 10 ms."""
    del where  # what the answer depends on
    every = entry_points()
    return {name: list(every.select(group=name)) for name in every.groups}


def _plugin(entry: EntryPoint) -> Plugin:
    name, version = ("an unknown distribution", "") if entry.dist is None else (entry.dist.name, entry.dist.version)
    return Plugin(entry.group, entry.name, entry.value, name, version)
