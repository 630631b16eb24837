"""What an engine is told by ``--sglang-*`` flags.  Imports nothing heavy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from miles.core.config.draft import Origin
from miles.rollout.flags import Engines

if TYPE_CHECKING:
    from miles.core.config import Config

_DECLARED = {"sglang_python": "python", "sglang_mem_fraction_static": "mem_fraction_static"}
"""Fields of their own among the flags, and what an engine calls them."""


def engine_options(config: Config) -> dict[str, Any]:
    """The flags that were given, without the prefix."""
    given = {name: field for field, name in _DECLARED.items() if config.origin[field] != Origin.DEFAULT}
    return {**config[Engines].sglang_options, **{name: getattr(config, field) for name, field in given.items()}}
