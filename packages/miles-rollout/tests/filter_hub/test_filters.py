from __future__ import annotations

from types import SimpleNamespace

import pytest

from miles.core.registry import Registry, load_object
from miles.core.types.sample import Sample, Status
from miles.rollout.filter_hub.buffer_filters import pop_first
from miles.rollout.filter_hub.dynamic_sampling_filters import check_no_aborted, check_reward_nonzero_std

ARGS = SimpleNamespace(reward_key=None)


@pytest.mark.parametrize(
    ("rewards", "keep", "reason"),
    [
        ([0.0, 1.0], True, None),
        ([1.0, 1.0, 1.0], False, "zero_std_1.0"),
        ([0.3, 0.3 + 1e-12], False, "zero_std_0.3"),
        ([0.5], False, "zero_std_0.5"),
        ([float("nan"), 1.0], False, "zero_std_nan"),
    ],
)
def test_groups_without_a_spread_of_rewards_are_dropped(rewards: list[float], keep: bool, reason: str | None) -> None:
    verdict = check_reward_nonzero_std(ARGS, [Sample(reward=reward) for reward in rewards])
    assert (verdict.keep, verdict.reason) == (keep, reason)


def test_the_reward_key_is_used() -> None:
    group = [Sample(reward={"a": 1.0, "b": value}) for value in (0.0, 1.0)]
    assert check_reward_nonzero_std(SimpleNamespace(reward_key="b"), group)
    assert not check_reward_nonzero_std(SimpleNamespace(reward_key="a"), group)


def test_groups_with_an_aborted_sample_are_dropped() -> None:
    assert check_no_aborted(ARGS, [Sample(status=Status.COMPLETED)])
    verdict = check_no_aborted(ARGS, [Sample(status=Status.COMPLETED), Sample(status=Status.ABORTED)])
    assert (verdict.keep, verdict.reason) == (False, "group_has_aborted")


def test_pop_first_removes_what_it_returns() -> None:
    buffer = [[Sample(index=index)] for index in range(3)]
    assert [group[0].index for group in pop_first(ARGS, None, buffer, 2)] == [0, 1]
    assert [group[0].index for group in buffer] == [2]
    assert len(pop_first(ARGS, None, buffer, 5)) == 1
    assert buffer == []


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("reward_nonzero_std", "miles.rollout.filter_hub.dynamic_sampling_filters.check_reward_nonzero_std"),
        ("no_aborted", "miles.rollout.filter_hub.dynamic_sampling_filters.check_no_aborted"),
        ("pop_first", "miles.rollout.filter_hub.buffer_filters.pop_first"),
    ],
)
def test_filters_have_names_and_documented_paths(name: str, path: str) -> None:
    assert Registry("miles.filters").get(name) is load_object(path)
