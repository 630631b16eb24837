"""Generate functions by name or dotted path, loaded once."""

from __future__ import annotations

from typing import Any

from miles.core.registry import Registry
from miles.core.types.sample import Group, Sample
from miles.rollout.generators.adapt import Generator, Together, adapt

GENERATORS = Registry("miles.generators")
DEFAULT = "single_turn"


class Generators:
    """The run's generate function, and those that samples ask for themselves (``generate_function_path``).

    ``args`` go to classes that are constructed with them.
    """

    def __init__(self, path: str | None, args: Any = None) -> None:
        self._args = args
        self._loaded: dict[str, Generator] = {}
        self._default = self._load(path or DEFAULT)

    def of(self, sample: Sample) -> Generator:
        """The function that generates ``sample``; PluginError when there is none."""
        path = sample.generate_function_path
        return self._default if path is None else self._load(path)

    def together(self, group: Group) -> Together | None:
        """What generates ``group`` at once; None when its samples go different ways or the function cannot."""
        if any(sample.generate_function_path or sample.routing_key or sample.multimodal_inputs for sample in group):
            return None
        return self._default.together

    def _load(self, path: str) -> Generator:
        if path not in self._loaded:
            self._loaded[path] = adapt(GENERATORS.get(path), self._args)
        return self._loaded[path]
