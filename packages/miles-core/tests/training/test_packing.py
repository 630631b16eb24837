from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from miles.core.training.bins import Item
from miles.core.training.packing import Packing, plan_micro_batches


@st.composite
def samples(draw):
    """Families of samples, in any order."""
    prompts = draw(st.lists(st.integers(1, 40), min_size=1, max_size=12))
    families = draw(st.lists(st.integers(0, len(prompts) - 1), min_size=1, max_size=40))
    return [Item(i, family, prompts[family], draw(st.integers(0, 60))) for i, family in enumerate(families)]


packings = st.builds(
    Packing,
    max_tokens=st.one_of(st.none(), st.integers(10, 200)),
    micro_batch_size=st.integers(1, 7),
    balance=st.booleans(),
)


def items(*lengths):
    """Samples of these lengths, each with a prompt of its own."""
    return [Item(i, i, 1, length - 1) for i, length in enumerate(lengths)]


def cost(items, chosen):
    """Tokens in a pack: every prompt once."""
    prompts = {items[i].family: items[i].prompt for i in chosen}
    return sum(prompts.values()) + sum(items[i].response for i in chosen)


@given(samples(), st.integers(1, 4), packings)
def test_every_sample_is_in_exactly_one_micro_batch(items, num_ranks, packing):
    plan = plan_micro_batches(items, num_ranks, packing)
    assert sorted(i for bins in plan for chosen in bins for i in chosen) == list(range(len(items)))


@given(samples(), st.integers(1, 4), packings)
def test_every_rank_has_the_same_number_of_micro_batches(items, num_ranks, packing):
    plan = plan_micro_batches(items, num_ranks, packing)
    assert len(plan) == num_ranks
    assert len({len(bins) for bins in plan}) == 1


@given(samples(), st.integers(1, 4), st.integers(10, 200), st.booleans())
def test_only_a_single_longer_sample_exceeds_the_cap(items, num_ranks, cap, balance):
    plan = plan_micro_batches(items, num_ranks, Packing(max_tokens=cap, balance=balance))
    for chosen in (chosen for bins in plan for chosen in bins):
        assert len(chosen) <= 1 or cost(items, chosen) <= cap


@given(samples(), st.integers(1, 4), packings)
def test_no_rank_idles_while_another_has_samples_to_give(items, num_ranks, packing):
    plan = plan_micro_batches(items, num_ranks, packing)
    samples_of_rank = [sum(map(len, bins)) for bins in plan]
    assert min(samples_of_rank) > 0 or len(items) < num_ranks


def test_samples_of_one_prompt_stay_together():
    family = [Item(i, 0, 50, 10) for i in range(0, 8, 2)] + [Item(i, 1, 50, 10) for i in range(1, 8, 2)]
    (bins,) = plan_micro_batches(family, 1, Packing(max_tokens=90))
    assert sorted(map(sorted, bins)) == [[0, 2, 4, 6], [1, 3, 5, 7]]


def test_without_a_cap_micro_batches_have_a_fixed_number_of_samples():
    assert plan_micro_batches(items(5, 1, 9, 2, 7), 1, Packing(micro_batch_size=2)) == [[[0, 1], [2, 3], [4]]]


def test_a_rank_without_samples_gets_empty_micro_batches():
    assert plan_micro_batches(items(4), 2, Packing(max_tokens=10)) == [[[0]], [[]]]


def test_balance_evens_out_the_tokens_of_ranks():
    lengths = [100, 1, 100, 1, 100, 1, 100, 1]
    packings = [Packing(micro_batch_size=4), Packing(micro_batch_size=4, balance=True)]
    plans = [plan_micro_batches(items(*lengths), 2, packing) for packing in packings]
    tokens = [[sum(lengths[i] for chosen in bins for i in chosen) for bins in plan] for plan in plans]
    assert tokens == [[400, 4], [202, 202]]


def test_realistic_lengths_fill_the_bins():
    lengths = [50 + (i * 7919) % 450 for i in range(2000)]
    (bins,) = plan_micro_batches(items(*lengths), 1, Packing(max_tokens=4096))
    assert sum(lengths) / (4096 * len(bins)) > 0.99


@given(items=samples(), num_ranks=st.integers(1, 4), multiple=st.integers(1, 4), packing=packings)
def test_micro_batches_come_in_the_groups_that_a_model_takes(items, num_ranks, multiple, packing):
    plan = plan_micro_batches(items, num_ranks, replace(packing, multiple=multiple))
    assert {len(of_rank) % multiple for of_rank in plan} == {0}
    assert sorted(i for of_rank in plan for chosen in of_rank for i in chosen) == list(range(len(items)))


def test_a_model_that_computes_every_prompt_counts_every_prompt():
    family = [Item(i, 0, 10, 1) for i in range(4)]
    (shared,) = plan_micro_batches(family, 1, Packing(max_tokens=22))
    (alone,) = plan_micro_batches(family, 1, Packing(max_tokens=22, shares_prompts=False))
    assert (len(shared), len(alone)) == (1, 2)
