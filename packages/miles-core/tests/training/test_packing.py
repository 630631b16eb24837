from hypothesis import given
from hypothesis import strategies as st

from miles.core.training.packing import Packing, best_fit_decreasing, plan_micro_batches

lengths_of_samples = st.lists(st.integers(1, 60), min_size=1, max_size=50)
packings = st.builds(
    Packing,
    max_tokens=st.one_of(st.none(), st.integers(10, 100)),
    micro_batch_size=st.integers(1, 7),
    balance=st.booleans(),
)


@given(lengths_of_samples, st.integers(1, 4), packings)
def test_every_sample_is_in_exactly_one_micro_batch(lengths, num_ranks, packing):
    plan = plan_micro_batches(lengths, num_ranks, packing)
    assert sorted(i for bins in plan for chosen in bins for i in chosen) == list(range(len(lengths)))


@given(lengths_of_samples, st.integers(1, 4), packings)
def test_every_rank_has_the_same_number_of_micro_batches(lengths, num_ranks, packing):
    plan = plan_micro_batches(lengths, num_ranks, packing)
    assert len(plan) == num_ranks
    assert len({len(bins) for bins in plan}) == 1


@given(lengths_of_samples, st.integers(1, 4), st.integers(10, 100), st.booleans())
def test_only_a_single_longer_sample_exceeds_the_cap(lengths, num_ranks, cap, balance):
    plan = plan_micro_batches(lengths, num_ranks, Packing(max_tokens=cap, balance=balance))
    for chosen in (chosen for bins in plan for chosen in bins):
        assert len(chosen) <= 1 or sum(lengths[i] for i in chosen) <= cap


@given(lengths_of_samples, st.integers(1, 4), packings)
def test_samples_of_a_micro_batch_are_sorted_by_length(lengths, num_ranks, packing):
    for chosen in (chosen for bins in plan_micro_batches(lengths, num_ranks, packing) for chosen in bins):
        assert chosen == sorted(chosen, key=lambda i: (-lengths[i], i))


def test_best_fit_fills_the_fullest_bin_that_has_room():
    assert best_fit_decreasing(range(5), [6, 5, 4, 3, 2], 10) == [[0, 2], [1, 3, 4]]


def test_without_a_cap_micro_batches_have_a_fixed_number_of_samples():
    assert plan_micro_batches([5, 1, 9, 2, 7], 1, Packing(micro_batch_size=2)) == [[[0, 1], [2, 3], [4]]]


def test_a_rank_without_samples_gets_empty_micro_batches():
    assert plan_micro_batches([4], 2, Packing(max_tokens=10)) == [[[0]], [[]]]


def test_balance_evens_out_the_tokens_of_ranks():
    lengths = [100, 1, 100, 1, 100, 1, 100, 1]
    unbalanced = plan_micro_batches(lengths, 2, Packing(micro_batch_size=4))
    balanced = plan_micro_batches(lengths, 2, Packing(micro_batch_size=4, balance=True))
    tokens = [[sum(lengths[i] for chosen in bins for i in chosen) for bins in plan] for plan in (unbalanced, balanced)]
    assert tokens == [[400, 4], [202, 202]]


def test_realistic_lengths_fill_the_bins():
    lengths = [50 + (i * 7919) % 450 for i in range(2000)]
    bins = best_fit_decreasing(range(len(lengths)), lengths, 4096)
    assert sum(lengths) / (4096 * len(bins)) > 0.99
