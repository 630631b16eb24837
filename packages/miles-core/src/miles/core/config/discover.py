"""Which flags exist, and the rules that go with them: found in every installed package by entry point.

``miles.config`` names a tuple of groups, ``miles.derivations`` a tuple of functions that fill in a ``Draft``, and
``miles.checks`` a tuple of functions that yield what is wrong with a ``Config``.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any

from miles.core import plugins
from miles.core.config.draft import Draft
from miles.core.config.flag import FlagSpec
from miles.core.config.group import Group
from miles.core.errors import PluginError
from miles.core.registry import load_object

if TYPE_CHECKING:
    from miles.core.config.config import Config

Derivation = Callable[[Draft], None]
Check = Callable[["Config"], Iterable[str]]


@dataclass(frozen=True)
class FlagTable:
    """All flags."""

    groups: tuple[type[Group], ...]
    flags: dict[str, FlagSpec]
    """By field name, in order of declaration."""

    @cached_property
    def by_spelling(self) -> dict[str, FlagSpec]:
        return {spec.spelling: spec for spec in self.flags.values() if spec.flag.captures is None}

    @cached_property
    def capturing(self) -> dict[str, FlagSpec]:
        """Fields that collect undeclared flags, by the prefix they collect."""
        return {spec.flag.captures: spec for spec in self.flags.values() if spec.flag.captures is not None}

    def of(self, group: type[Group]) -> list[FlagSpec]:
        """The flags of one group."""
        return [spec for spec in self.flags.values() if spec.group is group]

    def find(self, name: str) -> FlagSpec | None:
        """The flag spelled ``name``, with or without its dashes, or stored under that field name."""
        return self.by_spelling.get("--" + name.lstrip("-").replace("_", "-")) or self.flags.get(name.replace("-", "_"))

    def collector(self, name: str) -> FlagSpec | None:
        """The field that collects the undeclared flag ``name``, if one does."""
        spelling = "--" + name.lstrip("-").replace("_", "-")
        found = (spec for prefix, spec in self.capturing.items() if spelling.startswith(prefix) and spelling != prefix)
        return next(found, None)

    def resembling(self, name: str) -> list[str]:
        """At most three spellings that may have been meant by ``name``, the likeliest first.

        They hold every word of it; or, if there are none, differ by a slip of the hand.
        """
        wanted = name.lstrip("-").replace("_", "-")
        names = [spelling.removeprefix("--") for spelling in ("--help", "--config", *self.by_spelling)]
        words = set(wanted.split("-"))
        holding = sorted((name for name in names if words <= set(name.split("-"))), key=lambda name: name.count("-"))
        if holding:
            return ["--" + name for name in holding[:3]]
        close = difflib.get_close_matches(wanted, names, n=3, cutoff=0.6)
        likeness = [difflib.SequenceMatcher(None, wanted, name).ratio() for name in close]
        return ["--" + name for name, ratio in zip(close, likeness, strict=True) if ratio > likeness[0] - 0.06]


@cache
def flag_table() -> FlagTable:
    """The table of everything installed.  Core's groups come first, then our other packages', then plugins'."""
    return build_table(_contributions("miles.config"))


@cache
def derivations() -> tuple[Derivation, ...]:
    """Rules that fill in what follows from what was given, in order."""
    return tuple(rule for _, rules in _contributions("miles.derivations") for rule in rules)


@cache
def checks() -> tuple[Check, ...]:
    """Rules across flags."""
    return tuple(rule for _, rules in _contributions("miles.checks") for rule in rules)


def build_table(contributions: Sequence[tuple[str, tuple[type[Group], ...]]]) -> FlagTable:
    """Join the groups of distributions.  Raises PluginError when two groups claim one flag."""
    flags: dict[str, FlagSpec] = {}
    owners: dict[str, FlagSpec] = {}
    for distribution, groups in contributions:
        for group in groups:
            for name, info in group.model_fields.items():
                spec = FlagSpec(name, group, distribution, info)
                clash = owners.get(name) or owners.get(spec.spelling)
                if clash is not None:
                    raise PluginError(
                        f"{spec.spelling} is declared twice: by {clash.group.__name__} of {clash.distribution} "
                        f"and by {group.__name__} of {distribution}. Uninstall one of them"
                    )
                flags[name] = owners[name] = owners[spec.spelling] = spec
    return FlagTable(groups=tuple(group for _, groups in contributions for group in groups), flags=flags)


def _contributions(group: str) -> list[tuple[str, tuple[Any, ...]]]:
    found = sorted(plugins.installed(group), key=lambda plugin: _rank(plugin.distribution))
    return [(plugin.distribution, load_object(plugin.target)) for plugin in found]


def _rank(distribution: str) -> int:
    own = plugins.OWN_DISTRIBUTIONS
    return own.index(distribution) if distribution in own else len(own)
