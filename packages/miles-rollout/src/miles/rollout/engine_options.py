"""What an engine is told by ``--sglang-*`` flags.  Imports nothing heavy."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from miles.core.config.draft import Origin
from miles.rollout.flags import Engines

if TYPE_CHECKING:
    from miles.core.config import Config

_DECLARED = {"sglang_python": "python", "sglang_mem_fraction_static": "mem_fraction_static"}
"""Fields of their own among the flags, and what an engine calls them."""


def engine_threads(config: Config) -> int:
    """CPU threads of each engine: what ``--engine-num-threads`` says, or an equal share of the cores."""
    engines = config[Engines]
    return engines.engine_num_threads or max(1, (os.cpu_count() or 1) // max(1, engines.rollout_num_engines))


def engine_options(config: Config) -> dict[str, Any]:
    """The flags that were given, without the prefix."""
    given = {name: field for field, name in _DECLARED.items() if config.origin[field] != Origin.DEFAULT}
    return {**config[Engines].sglang_options, **{name: getattr(config, field) for name, field in given.items()}}
