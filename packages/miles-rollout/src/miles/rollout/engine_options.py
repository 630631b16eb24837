"""What an engine is told by ``--sglang-*`` flags.  Imports nothing heavy."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from miles.core.config.draft import Origin
from miles.rollout.flags import Distillation, Engines, Rollout

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


def teacher_to_serve(config: Config) -> str | None:
    """The model of the teacher for which a run starts an engine."""
    flags = config[Distillation]
    return flags.opd_teacher_load if flags.opd_type == "sglang" else None


def own_engines(config: Config) -> list[int]:
    """Indices of the engines that a run starts itself: the policy's, and after them the teacher's."""
    count = config[Engines].rollout_num_engines
    policy = [] if config[Rollout].rollout_external else list(range(count))
    return policy if teacher_to_serve(config) is None else [*policy, count]
