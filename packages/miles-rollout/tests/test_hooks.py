from __future__ import annotations

from typing import Any

import pytest

from miles.core.config import Config
from miles.core.errors import EngineError, RolloutError
from miles.core.types.sample import Sample
from miles.rollout.hooks import Hooks


def broken_filter(args: Any, samples: list[Sample]) -> bool:
    return bool(samples[0].metadata["missing"])


def filter_that_meets_our_own_error(args: Any, samples: list[Sample]) -> bool:
    raise EngineError("the scorer is gone")


async def test_an_error_of_a_hook_names_the_hook() -> None:
    hooks = Hooks.load(Config.of(dynamic_sampling_filter_path="test_hooks.broken_filter"))
    with pytest.raises(RolloutError, match=r"--dynamic-sampling-filter-path test_hooks.broken_filter raised KeyError"):
        await hooks.judge(None, [Sample()])


async def test_an_error_that_says_all_already_passes_through() -> None:
    hooks = Hooks.load(Config.of(dynamic_sampling_filter_path="test_hooks:filter_that_meets_our_own_error"))
    with pytest.raises(EngineError, match="the scorer is gone"):
        await hooks.judge(None, [Sample()])


async def test_without_a_filter_every_group_is_kept() -> None:
    assert await Hooks.load(Config.of()).judge(None, [Sample()])
