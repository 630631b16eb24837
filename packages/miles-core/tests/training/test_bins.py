import pytest
from hypothesis import given
from hypothesis import strategies as st

from miles.core.training.bins import Item, fill_bins, units_of


def items(*lengths):
    """Samples of these lengths, each with a prompt of its own."""
    return [Item(i, i, 1, length - 1) for i, length in enumerate(lengths)]


def filled(samples, capacity):
    bins = fill_bins(units_of(samples, capacity), capacity)
    return [[item.sample for unit in chosen for item in unit.items] for chosen in bins]


def test_the_largest_that_fits_goes_first():
    assert filled(items(6, 5, 4, 3, 2), 10) == [[0, 2], [1, 3, 4]]


def test_an_item_larger_than_a_bin_is_alone():
    assert filled(items(12, 3), 10) == [[0], [1]]


@pytest.mark.parametrize(("prompt", "response", "with_part"), [(3, 7, True), (6, 4, False)])
def test_a_family_is_cut_only_where_more_is_won_than_its_prompt(prompt, response, with_part):
    """Ten tokens of the first bin are left over, which one sample of the family fills."""
    samples = [Item(0, 0, 10, 80)] + [Item(i, 1, prompt, response) for i in range(1, 13)]
    assert len(filled(samples, 100)[0]) == (2 if with_part else 1)


@st.composite
def families(draw):
    prompts = draw(st.lists(st.integers(1, 60), min_size=1, max_size=10))
    owners = draw(st.lists(st.integers(0, len(prompts) - 1), min_size=1, max_size=60))
    return [Item(i, family, prompts[family], draw(st.integers(0, 90))) for i, family in enumerate(owners)]


@given(families(), st.integers(5, 300))
def test_every_item_is_in_one_bin_and_no_bin_overflows(samples, capacity):
    bins = fill_bins(units_of(samples, capacity), capacity)
    assert sorted(item.sample for chosen in bins for unit in chosen for item in unit.items) == list(range(len(samples)))
    for chosen in bins:
        tokens = sum(unit.tokens for unit in chosen)
        assert tokens <= capacity or sum(len(unit.items) for unit in chosen) == 1


@given(families(), st.integers(5, 300))
def test_the_same_samples_fill_the_same_bins(samples, capacity):
    assert filled(samples, capacity) == filled(samples, capacity)
