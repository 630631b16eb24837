from __future__ import annotations

import random
from itertools import combinations
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from miles.core.types.sample import PrefixCacheInfo, Sample, SpecInfo, Status
from miles.rollout import metrics


def scored(group: int, *rewards: Any) -> list[Sample]:
    return [Sample(group_index=group, reward=reward, response_length=1) for reward in rewards]


def test_lengths_count_what_trains() -> None:
    samples = [Sample(response_length=4, loss_mask=[1, 0, 0, 1]), Sample(response_length=7), Sample(response_length=3)]
    found = metrics.sample_metrics(samples)
    assert {name: value for name, value in found.items() if name.startswith("response_len")} == {
        "response_len/mean": 4,
        "response_len/median": 3,
        "response_len/max": 7,
        "response_len/min": 2,
    }


def test_truncation_and_repetition_are_shares() -> None:
    looping = Sample(response="again and " * 2000, status=Status.TRUNCATED)
    varied = "".join(random.Random(0).choices("abcdefghijklmnopqrstuvwxyz ", k=20_000))
    found = metrics.sample_metrics([looping, Sample(response=varied, status=Status.COMPLETED)])
    assert (found["truncated_ratio"], found["repetition_frac"]) == (0.5, 0.5)


def test_short_texts_never_repeat() -> None:
    assert not metrics.is_repetitive("a" * 10_000)
    assert metrics.is_repetitive("a" * 10_001)


def test_engine_counts_are_pooled() -> None:
    samples = [
        Sample(prefix_cache_info=PrefixCacheInfo(3, 4), spec_info=SpecInfo(2, 4, 1, 3)),
        Sample(prefix_cache_info=PrefixCacheInfo(1, 4), spec_info=SpecInfo(0, 4, 1, 1)),
    ]
    found = metrics.sample_metrics(samples)
    assert (found["prefix_cache_hit_rate"], found["avg_cached_tokens_per_sample"]) == (0.5, 2)
    assert (found["spec_accept_rate"], found["spec_accept_length"]) == (0.25, 2)


def test_weight_versions_show_their_spread() -> None:
    found = metrics.sample_metrics([Sample(weight_versions=["2", "3"]), Sample(weight_versions=["3"])])
    assert (found["weight_version/min"], found["weight_version/max"], found["mixed_version_ratio"]) == (2, 3, 0.5)


def test_groups_without_spread_are_counted_by_reward() -> None:
    samples = scored(0, 1.0, 1.0) + scored(1, 0.0, 0.0) + scored(2, 0.0, 1.0) + scored(3, -0.04, -0.04) + scored(4, 9)
    assert metrics.zero_std(samples) == {
        "zero_std/count_1.0": 1,
        "zero_std/count_0.0": 2,
        "zero_std/all_zero_percentage": 0.5,
        "zero_std/all_one_percentage": 0.25,
    }


def test_categories_come_from_the_reward_or_the_metadata() -> None:
    assert metrics.sample_metrics(scored(0, {"pred": "a"}, {"pred": "b"}), category_key="pred")["error_cat/a"] == 0.5
    graded = [Sample(reward=1.0, metadata={"reward_category": "correct"}), Sample(reward=0.0)]
    assert metrics.sample_metrics(graded, category_key="category")["error_cat/correct"] == 0.5


@given(st.lists(st.lists(st.sampled_from([0.0, 1.0]), min_size=4, max_size=6), min_size=1, max_size=3))
def test_pass_at_k_is_the_chance_that_k_draws_contain_a_pass(groups: list[list[float]]) -> None:
    samples = [sample for number, rewards in enumerate(groups) for sample in scored(number, *rewards)]
    found = metrics.pass_at_k(samples)
    assert set(found) == {"pass@1", "pass@2", "pass@4"}
    for k in (1, 2, 4):
        chances = [[max(draw) for draw in combinations(rewards, k)] for rewards in groups]
        expected = sum(sum(passes) / len(passes) for passes in chances) / len(groups)
        assert found[f"pass@{k}"] == pytest.approx(expected)


def test_pass_at_k_needs_scored_groups() -> None:
    assert metrics.pass_at_k([Sample(group_index=0)]) == {}


def test_throughput_counts_all_and_trained_tokens() -> None:
    samples = [Sample(response_length=10, loss_mask=[1] * 4 + [0] * 6), Sample(response_length=6)]
    assert metrics.throughput(samples, 2.0, 4) == {
        "tokens_per_gpu_per_sec": 2.0,
        "longest_sample_tokens_per_sec": 5.0,
        "effective_tokens_per_gpu_per_sec": 1.25,
        "longest_effective_sample_tokens_per_sec": 3.0,
    }


def test_time_spent_in_tools_is_told_apart() -> None:
    samples = [Sample(response_length=10, non_generation_time=1.0), Sample(response_length=6)]
    found = metrics.throughput(samples, 2.0, 1)
    assert found["longest_sample_tokens_per_sec_without_non_generation"] == 10
    assert found["non_generation_time/mean"] == 0.5


def test_correct_lengths_are_of_samples_with_a_full_reward() -> None:
    samples = [
        Sample(reward=1.0, response_length=4),
        Sample(reward=1.0, response_length=8),
        Sample(reward=0.0, response_length=99),
    ]
    found = metrics.correct_lengths(samples)
    assert (found["correct_length/p50"], found["correct_length/p100"], found["correct_response_lengths"]) == (6, 8, 6)
    assert metrics.correct_lengths([Sample(reward=0.0)]) == {}


def test_turns_are_summed_up() -> None:
    samples = [
        Sample(response_length=8, loss_mask=[1] * 4 + [0] * 4, metadata={"round_number": 2}),
        Sample(response_length=2, metadata={"round_number": 1}),
    ]
    found = metrics.multi_turn_metrics(samples, max_response_len=8)
    assert found["raw_response_length/response_length_mean"] == 5
    assert found["wo_obs_response_length/response_length_max"] == 4
    assert found["raw_response_length/response_length_clip_ratio"] == 0.5
    assert found["multi_turn_metric/round_number_max"] == 2


def test_no_samples_give_no_metrics() -> None:
    assert metrics.sample_metrics([]) == {}
    assert metrics.throughput([], 1.0, 1) == {}
