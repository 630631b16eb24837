"""From the name of a reward type to what scores with it."""

from __future__ import annotations

from typing import Any

from miles.core.errors import ConfigError, PluginError
from miles.core.registry import Registry, load_object
from miles.rewards.context import Context
from miles.rewards.custom import CustomScorer
from miles.rewards.grader import Grader
from miles.rewards.mix import MixScorer, parse_mix
from miles.rewards.scorer import Scorer

GROUP = "miles.rewards"
BOXED = "boxed_"


class Catalogue:
    """The reward types that are installed."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._registry = Registry(GROUP)

    def scorer(self, rm_type: str) -> Scorer:
        """What scores with ``rm_type``: a name, ``boxed_`` and a name, a dotted path, or a weighted sum of those.

        Raises ConfigError when there is no such type, naming the nearest one.
        """
        parts = parse_mix(rm_type)
        if len(parts) == 1 and parts[0].weight == 1.0:
            return self._single(parts[0].name)
        scorers = [(part, self._single(part.name)) for part in parts]
        return MixScorer(scorers, self._context.settings.reward_key)

    def custom(self, path: str) -> CustomScorer:
        """What scores with the function at a dotted path."""
        try:
            function = load_object(path)
        except PluginError as error:
            raise ConfigError(f"--custom-rm-path {path}: {error}") from error
        if not callable(function):
            raise ConfigError(f"--custom-rm-path {path}: it is a {type(function).__name__}, not a function")
        return CustomScorer(function, worker_path(path), self._context)

    def _single(self, name: str) -> Scorer:
        boxed = name.startswith(BOXED) and name not in self._registry
        name = name.removeprefix(BOXED) if boxed else name
        found, path = self._find(name)
        if isinstance(found, Grader):
            if missing := found.missing:
                raise ConfigError(missing)
            return found.scorer(self._context, boxed=boxed)
        if boxed:
            raise ConfigError(
                f"reward type {BOXED}{name}: {name} does not grade text, so {BOXED} cannot stand before it"
            )
        if hasattr(found, "scorer"):
            scorer: Scorer = found.scorer(self._context)
            return scorer
        return CustomScorer(found, path, self._context)

    def _find(self, name: str) -> tuple[Any, str]:
        try:
            plugin = self._registry.find(name)
            found = self._registry.get(name)
        except PluginError as error:
            raise ConfigError(f"reward type {name}: {error}") from error
        if not callable(found):
            raise ConfigError(f"reward type {name}: it is a {type(found).__name__}, not a function")
        return found, worker_path(plugin.target if plugin else name)


def worker_path(path: str) -> str:
    """A dotted path in the form that workers resolve: ``package.module:attribute``."""
    module, separator, attribute = path.partition(":")
    if separator:
        return f"{module}:{attribute}"
    module, _, attribute = path.rpartition(".")
    return f"{module}:{attribute}"
