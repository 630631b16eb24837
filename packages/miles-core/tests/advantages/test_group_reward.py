import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from miles.core.advantages.group_reward import GroupNormalization, normalize_group_rewards
from miles.core.oracle import advantages

BOTH = GroupNormalization(mean=True, std=True)
MEAN = GroupNormalization(mean=True, std=False)
NAN = float("nan")


def test_rewards_worked_by_hand():
    found = normalize_group_rewards([1.0, 0.0, 5.0, 7.0], [3, 3, 4, 4], BOTH)
    scale = 0.5**0.5 + 1e-6
    np.testing.assert_allclose(found, [0.5 / scale, -0.5 / scale, -1 / (2**0.5 + 1e-6), 1 / (2**0.5 + 1e-6)])
    assert normalize_group_rewards([1.0, 0.0, 5.0, 7.0], [3, 3, 4, 4], MEAN).tolist() == [0.5, -0.5, -1.0, 1.0]


@given(
    st.lists(st.tuples(st.integers(-8, 8), st.integers(0, 3)), min_size=1, max_size=12),
    st.booleans(),
    st.booleans(),
)
def test_rewards_equal_the_oracle_whatever_the_sizes_and_order_of_groups(samples, mean, std):
    rewards = [value / 4 for value, _ in samples]
    groups = [group for _, group in samples]
    found = normalize_group_rewards(rewards, groups, GroupNormalization(mean=mean, std=std))
    np.testing.assert_allclose(found, advantages.group_rewards(rewards, groups, mean=mean, std=std), atol=1e-12)


def test_a_group_of_one_becomes_zero():
    assert normalize_group_rewards([1.0], [0], BOTH).tolist() == [0.0]


def test_equal_rewards_become_exactly_zero():
    assert normalize_group_rewards([0.1] * 3, [0] * 3, BOTH).tolist() == [0.0] * 3


def test_an_unscored_sample_gets_zero_and_leaves_its_group_alone():
    assert normalize_group_rewards([1.0, NAN, 0.0, NAN], [0, 0, 0, 1], MEAN).tolist() == [0.5, 0.0, -0.5, 0.0]


def test_samples_of_one_execution_count_once():
    found = normalize_group_rewards([1.0, 1.0, 1.0, 0.0], [0] * 4, MEAN, execution_ids=[7, 7, 7, 8])
    assert found.tolist() == [0.5, 0.5, 0.5, -0.5]


def test_samples_of_one_execution_must_agree():
    with pytest.raises(ValueError, match="samples 0 and 1 come from one execution"):
        normalize_group_rewards([1.0, 0.0], [0, 0], MEAN, execution_ids=[7, 7])


@pytest.mark.parametrize(("reward", "mean"), [(math.inf, True), (math.inf, False), (NAN, False)])
def test_rewards_without_a_neutral_value_are_refused(reward, mean):
    with pytest.raises(ValueError, match=r"samples \[1\]"):
        normalize_group_rewards([1.0, reward], [0, 0], GroupNormalization(mean=mean, std=False))


@pytest.mark.parametrize(
    ("estimator", "expected"),
    [
        ("grpo", BOTH),
        ("gspo", BOTH),
        ("reinforce_plus_plus_baseline", MEAN),
        ("ppo", GroupNormalization(mean=False, std=False)),
    ],
)
def test_estimators_get_the_rewards_they_want(estimator, expected):
    assert GroupNormalization.of(estimator, rewards_normalization=True, std_normalization=True) == expected


def test_flags_switch_normalization_off():
    off = GroupNormalization.of("grpo", rewards_normalization=False, std_normalization=True)
    assert off == GroupNormalization(mean=False, std=False)
    assert GroupNormalization.of("grpo", rewards_normalization=True, std_normalization=False) == MEAN


def test_group_rewards_need_no_torch():
    code = "import miles.core.advantages.group_reward, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
