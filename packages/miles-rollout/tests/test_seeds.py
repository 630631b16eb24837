from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from miles.rollout.seeds import sampling_seed


@given(st.integers(-(2**31), 2**31), st.integers(0, 2**40))
def test_seeds_have_31_bits_and_repeat(seed: int, index: int) -> None:
    assert 0 <= sampling_seed(seed, index) < 2**31
    assert sampling_seed(seed, index) == sampling_seed(seed, index)


def test_seeds_differ_between_samples_runs_and_streams() -> None:
    assert len({sampling_seed(1, index) for index in range(10_000)}) > 9_990
    assert sampling_seed(1, 5) != sampling_seed(2, 5)
    assert sampling_seed(1, 5) != sampling_seed(1, 5, "eval")


def test_a_seed_never_changes_between_versions() -> None:
    assert [sampling_seed(42, index) for index in range(3)] == [1997225882, 2109776846, 497479757]
