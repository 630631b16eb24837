from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from miles.core.config import Config
from miles.core.errors import RolloutError
from miles.core.flags.algorithm import Algorithm
from miles.core.types.sample import Sample, Status
from miles.rollout import convert


def make(index: int, group: int, reward: Any = 0.0, **changes: Any) -> Sample:
    values = {"tokens": [1, 2, 3, index], "response_length": 2, "status": Status.COMPLETED, **changes}
    return Sample(index=index, group_index=group, reward=reward, **values)


def algorithm(**values: Any) -> Algorithm:
    return Config.of(n_samples_per_prompt=2, **values)[Algorithm]


def batch(samples: list[Sample]) -> Any:
    zeros = [0.0] * len(samples)
    return convert.to_batch(3, samples, zeros, zeros)


def test_columns_are_exact() -> None:
    first = make(0, 0, rollout_log_probs=[-0.5, -0.25], loss_mask=[0, 1], status=Status.TRUNCATED)
    second = make(1, 0, rollout_log_probs=[-1.0, -2.0], remove_sample=True)
    made = batch([first, second])
    assert made.rollout_id == 3
    assert [tokens.tolist() for tokens in made.tokens] == [[1, 2, 3, 0], [1, 2, 3, 1]]
    assert made.tokens[0].dtype == np.int64
    assert [mask.tolist() for mask in made.loss_masks] == [[0, 1], [0, 0]]
    assert made.loss_masks[0].dtype == np.float32
    assert made.truncated == (True, False)
    assert (made.sample_indices, made.group_indices) == ((0, 1), (0, 0))
    assert [values.tolist() for values in made.rollout_log_probs] == [[-0.5, -0.25], [-1.0, -2.0]]
    assert made.teacher_log_probs is None
    assert made.routed_experts is None
    assert made.extra == {}


def test_a_sample_without_a_mask_trains_whole() -> None:
    assert batch([make(0, 0)]).loss_masks[0].tolist() == [1, 1]


def test_a_column_that_only_some_samples_have_is_an_error() -> None:
    samples = [make(0, 0, rollout_log_probs=[-1.0, -1.0]), make(1, 0)]
    with pytest.raises(RolloutError, match=r"1 of 2 samples have no rollout_log_probs \(sample 1 is the first\)"):
        batch(samples)


def test_metadata_for_training_becomes_a_column() -> None:
    made = batch([make(0, 0, train_metadata={"a": 1}), make(1, 0)])
    assert made.extra == {"metadata": ({"a": 1}, None)}


def test_routed_experts_are_kept_intact() -> None:
    experts = np.arange(12, dtype=np.int32).reshape(3, 2, 2)
    made = batch([make(0, 0, rollout_routed_experts=experts)])
    assert (made.routed_experts[0] == experts).all()


def test_a_sample_without_an_index_is_refused() -> None:
    with pytest.raises(RolloutError, match=r"has no index .*the data source must set it"):
        batch([Sample(group_index=0, tokens=[1], prompt="hello")])


def test_rewards_are_relative_to_the_group() -> None:
    samples = [make(0, 0, 1.0), make(1, 0, 0.0), make(2, 1, 5.0), make(3, 1, 5.0)]
    raw, rewards = convert.train_rewards(samples, algorithm(), None)
    assert raw == [1.0, 0.0, 5.0, 5.0]
    assert rewards == pytest.approx([0.7071, -0.7071, 0, 0], abs=1e-4)
    _, centred = convert.train_rewards(samples, algorithm(grpo_std_normalization=False), None)
    assert centred == [0.5, -0.5, 0, 0]
    assert convert.train_rewards(samples, algorithm(rewards_normalization=False), None)[1] == raw
    assert convert.train_rewards(samples, algorithm(advantage_estimator="ppo"), None)[1] == raw


def test_samples_of_one_execution_count_once() -> None:
    samples = [make(0, 0, 1.0, rollout_id=0), make(0, 0, 1.0, rollout_id=0), make(1, 0, 0.0)]
    _, rewards = convert.train_rewards(samples, algorithm(grpo_std_normalization=False), None)
    assert rewards == [0.5, 0.5, -0.5]


def test_a_missing_reward_is_explained() -> None:
    with pytest.raises(RolloutError, match="sample 1 has no reward"):
        convert.train_rewards([make(1, 0, None)], algorithm(), None)
    with pytest.raises(RolloutError, match="set --reward-key to one of them"):
        convert.train_rewards([make(1, 0, {"score": 1})], algorithm(), None)


def test_columns_of_a_hook_get_defaults() -> None:
    made = convert.to_custom_batch(
        1, {"tokens": [[1, 2], [3, 4]], "response_lengths": [1, 2], "rewards": [1, 2], "mine": ["a", "b"]}
    )
    assert [mask.tolist() for mask in made.loss_masks] == [[1], [1, 1]]
    assert (made.rewards, made.raw_rewards, made.truncated) == ((1.0, 2.0), (1.0, 2.0), (False, False))
    assert made.sample_indices == (0, 1)
    assert made.extra == {"mine": ("a", "b")}


@pytest.mark.parametrize(
    ("columns", "complaint"),
    [
        ({"tokens": [[1]]}, "returned no response_lengths, rewards"),
        ({"tokens": [[1]], "response_lengths": [1], "rewards": []}, "columns of unequal lengths"),
    ],
)
def test_unusable_columns_of_a_hook_are_named(columns: Any, complaint: str) -> None:
    with pytest.raises(RolloutError, match=complaint):
        convert.to_custom_batch(1, columns)


def test_trimming_leaves_whole_steps() -> None:
    made = batch([make(index, 0) for index in range(7)])
    assert convert.trim(made, 3).sample_indices == (0, 1, 2, 3, 4, 5)
    assert convert.trim(made, 7) is made
    with pytest.raises(RolloutError, match="7 samples, less than --global-batch-size 8"):
        convert.trim(made, 8)
