"""Rollout and evaluation functions of both documented forms, called alike."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from miles.core.protocols.rollout import DataSource, RolloutFn
from miles.core.types.rollout import RolloutFnConstructorInput, RolloutFnEvalInput, RolloutFnTrainInput


class RolloutFunctions:
    """Loads each function once; a class is constructed once, with the data source, and serves both purposes.

    ``weight_version`` tells the version that the engines hold.
    """

    def __init__(self, args: Any, source: DataSource | None, weight_version: Callable[[], int]) -> None:
        self._input = RolloutFnConstructorInput(args, source)
        self._weight_version = weight_version
        self._made: dict[Any, RolloutFn] = {}

    def adapt(self, function: Any) -> RolloutFn:
        """``function``, or an object of the class it is, as ``(args, rollout_id, data_source, evaluation)``."""
        if not inspect.isclass(function):
            plain: RolloutFn = function
            return plain
        constructor: Any = function
        if constructor not in self._made:
            self._made[constructor] = _ByInput(constructor(self._input), self._weight_version)
        return self._made[constructor]


class _ByInput:
    """An object that takes one input.  Its attributes (``needs_engines``) show through."""

    def __init__(self, inner: Any, weight_version: Callable[[], int]) -> None:
        self._inner, self._weight_version = inner, weight_version

    def __call__(self, args: Any, rollout_id: int, data_source: DataSource, evaluation: bool = False) -> Any:
        version = self._weight_version()
        if evaluation:
            state = getattr(args, "generate_state", None)
            return self._inner(RolloutFnEvalInput(rollout_id, state, version))
        return self._inner(RolloutFnTrainInput(rollout_id, version))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)
