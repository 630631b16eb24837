"""Which flags exist: the groups of every installed package, found by the entry point ``miles.config``."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any

from miles.core import plugins
from miles.core.config.flag import FlagSpec
from miles.core.config.group import Group
from miles.core.errors import PluginError
from miles.core.registry import load_object

if TYPE_CHECKING:
    from miles.core.config.config import Config
    from miles.core.config.draft import Draft

Derivation = Callable[["Draft"], None]
Check = Callable[["Config"], Iterator[str]]

ENTRY_POINT_GROUP = "miles.config"


@dataclass(frozen=True)
class FlagTable:
    """All flags, and the rules that belong to them."""

    groups: tuple[type[Group], ...]
    flags: dict[str, FlagSpec]
    """By field name, in order of declaration."""
    derivations: tuple[Derivation, ...]
    checks: tuple[Check, ...]

    @cached_property
    def by_spelling(self) -> dict[str, FlagSpec]:
        return {spec.spelling: spec for spec in self.flags.values()}

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

    def nearest(self, name: str) -> str | None:
        """Spelling that resembles ``name`` most, if any does."""
        wanted = "--" + name.lstrip("-").replace("_", "-")
        matches = difflib.get_close_matches(wanted, self.by_spelling, n=1, cutoff=0.6)
        return matches[0] if matches else None


@cache
def flag_table() -> FlagTable:
    """The table of everything installed.  Core's groups come first, then packages by name."""
    found = plugins.installed(ENTRY_POINT_GROUP)
    found.sort(
        key=lambda plugin: (plugin.distribution != "miles-core", plugin.distribution not in plugins.OWN_DISTRIBUTIONS)
    )
    contributions = [(plugin.distribution, *_contribution(plugin.target)) for plugin in found]
    return build_table(contributions)


def build_table(
    contributions: list[tuple[str, tuple[type[Group], ...], tuple[Derivation, ...], tuple[Check, ...]]],
) -> FlagTable:
    """Join the contributions of distributions.  Raises PluginError when two groups claim one flag."""
    flags: dict[str, FlagSpec] = {}
    owner_of_spelling: dict[str, FlagSpec] = {}
    for distribution, groups, _, _ in contributions:
        for group in groups:
            for name, info in group.model_fields.items():
                spec = FlagSpec(name, group, distribution, info)
                clash = flags.get(name) or owner_of_spelling.get(spec.spelling)
                if clash is not None:
                    raise PluginError(
                        f"{spec.spelling} is declared twice: by {clash.group.__name__} of {clash.distribution} "
                        f"and by {group.__name__} of {distribution}. Uninstall one of them"
                    )
                flags[name] = owner_of_spelling[spec.spelling] = spec
    return FlagTable(
        groups=tuple(group for _, groups, _, _ in contributions for group in groups),
        flags=flags,
        derivations=tuple(rule for _, _, rules, _ in contributions for rule in rules),
        checks=tuple(rule for _, _, _, rules in contributions for rule in rules),
    )


def _contribution(target: str) -> tuple[tuple[type[Group], ...], tuple[Derivation, ...], tuple[Check, ...]]:
    """``GROUPS`` of a module, and ``DERIVATIONS`` and ``CHECKS`` beside it where there are any."""
    module_name = target.partition(":")[0]
    groups: tuple[type[Group], ...] = load_object(target)
    module: Any = __import__(module_name, fromlist=["GROUPS"])
    return groups, tuple(getattr(module, "DERIVATIONS", ())), tuple(getattr(module, "CHECKS", ()))
