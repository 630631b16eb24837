import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from miles.core.config import Config
from miles.core.config.batch import nearest_divisors
from miles.core.errors import ConfigError

KNOBS = ("rollout_batch_size", "n_samples_per_prompt", "global_batch_size", "num_steps_per_rollout")


def of(**knobs: int) -> Config:
    flags = [token for name, value in knobs.items() for token in ("--" + name.replace("_", "-"), str(value))]
    return Config.from_flags(flags, check=False)


@settings(deadline=None)  # the first example reads what is installed
@given(
    steps=st.integers(1, 6),
    per_step=st.integers(1, 12),
    samples=st.integers(1, 8),
    left_out=st.sampled_from([*KNOBS, None]),
)
def test_three_knobs_give_the_fourth_and_four_are_accepted(steps, per_step, samples, left_out):
    knobs = dict(zip(KNOBS, (steps * per_step, samples, per_step * samples, steps), strict=True))
    given_knobs = {name: value for name, value in knobs.items() if name != left_out}
    config = of(**given_knobs)
    assert {name: getattr(config, name) for name in KNOBS} == knobs
    if left_out is not None:
        assert config.origin[left_out] == "derived"


def test_one_step_unless_said_otherwise():
    config = of(rollout_batch_size=4, n_samples_per_prompt=8)
    assert (config.num_steps_per_rollout, config.global_batch_size) == (1, 32)


def test_one_sample_per_prompt_as_in_fine_tuning():
    config = of(rollout_batch_size=64, global_batch_size=16)
    assert (config.n_samples_per_prompt, config.num_steps_per_rollout) == (1, 4)


def test_an_inexact_division_names_the_nearest_values_that_work():
    with pytest.raises(ConfigError, match=r"--global-batch-size 60 does not divide the 64.* 32 or 64 would work"):
        of(rollout_batch_size=8, n_samples_per_prompt=8, global_batch_size=60)
    with pytest.raises(ConfigError, match=r"--num-steps-per-rollout 5 does not divide.* 4 or 8 would work"):
        of(rollout_batch_size=8, n_samples_per_prompt=8, num_steps_per_rollout=5)
    with pytest.raises(ConfigError, match=r"are no multiple of --rollout-batch-size 7.* 6 or 8 would work"):
        of(rollout_batch_size=7, global_batch_size=24, num_steps_per_rollout=1)


def test_four_knobs_that_disagree_are_refused():
    with pytest.raises(ConfigError, match=r"= 64 samples per rollout, but .* = 96"):
        of(rollout_batch_size=8, n_samples_per_prompt=8, global_batch_size=48, num_steps_per_rollout=2)


def test_without_enough_knobs_the_rollout_batch_size_is_required():
    with pytest.raises(ConfigError, match=r"--rollout-batch-size is required"):
        of(n_samples_per_prompt=8, global_batch_size=16)


@given(total=st.integers(1, 300), wanted=st.integers(1, 400))
def test_nearest_divisors_divide_and_have_none_between(total, wanted):
    found = nearest_divisors(total, wanted)
    assert found
    assert all(total % number == 0 for number in found)
    between = range(min(found) + 1, max(found)) if len(found) == 2 else ()
    assert not any(total % number == 0 for number in between)
