import pytest
from hypothesis import given
from hypothesis import strategies as st

from miles.core.training.balance import karmarkar_karp


def sums(weights, sets):
    return sorted(sum(weights[i] for i in s) for s in sets)


@pytest.mark.parametrize(
    ("weights", "k", "equal_size", "expected"),
    [
        ([10, 20, 30, 40], 2, False, [50, 50]),
        ([100, 90, 10, 5, 5, 1], 2, True, [105, 106]),
        ([8, 7, 6, 5, 4], 2, False, [14, 16]),
        (list(range(1, 10)), 3, True, [14, 15, 16]),
        ([1000, 1, 1, 1], 2, True, [2, 1001]),
        ([1000, 1, 1, 1], 2, False, [3, 1000]),
    ],
)
def test_known_partitions(weights, k, equal_size, expected):
    assert sums(weights, karmarkar_karp(weights, k, equal_size=equal_size)) == expected


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=40), st.integers(1, 6))
def test_every_item_is_in_exactly_one_of_the_non_empty_sets(weights, k):
    if len(weights) < k:
        with pytest.raises(ValueError, match="non-empty"):
            karmarkar_karp(weights, k)
        return
    sets = karmarkar_karp(weights, k)
    assert len(sets) == k
    assert all(sets)
    assert sorted(i for s in sets for i in s) == list(range(len(weights)))


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=10), st.integers(1, 5))
def test_equal_size_sets_have_equal_sizes(weights, k):
    weights = weights * k
    assert {len(s) for s in karmarkar_karp(weights, k, equal_size=True)} == {len(weights) // k}


def test_unequal_division_into_equal_sizes_is_refused():
    with pytest.raises(ValueError, match="5 items cannot be split into 2 sets of equal size"):
        karmarkar_karp([1, 2, 3, 4, 5], 2, equal_size=True)
