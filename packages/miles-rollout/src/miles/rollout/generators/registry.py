"""Generate functions by name or dotted path, loaded once."""

from __future__ import annotations

from miles.core.registry import Registry
from miles.core.types.rollout import GenerateFnInput
from miles.core.types.sample import Sample
from miles.rollout.generators.adapt import GenerateCall, adapt

GENERATORS = Registry("miles.generators")
DEFAULT = "single_turn"


class Generators:
    """Calls the run's generate function, or the one that a sample asks for itself (``generate_function_path``)."""

    def __init__(self, path: str | None) -> None:
        self._path = path or DEFAULT
        self._loaded: dict[str, GenerateCall] = {}
        self.load(self._path)

    def load(self, path: str) -> GenerateCall:
        """The function at ``path``; PluginError when there is none."""
        if path not in self._loaded:
            self._loaded[path] = adapt(GENERATORS.get(path))
        return self._loaded[path]

    async def __call__(self, input: GenerateFnInput) -> list[Sample]:
        return await self.load(input.sample.generate_function_path or self._path)(input)
