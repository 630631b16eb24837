import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from miles.core.training.segments import Segments

CPU = torch.device("cpu")


@st.composite
def packs(draw):
    """Lengths of samples, and the token at each of their positions: neighbours may share a prefix."""
    lengths = draw(st.lists(st.integers(1, 300), min_size=1, max_size=30))
    tokens, next_token, previous = [], 0, []
    for length in lengths:
        shared = min(draw(st.integers(0, 20)), len(previous), length - 1)
        fresh = length - shared
        previous = [*previous[:shared], *range(next_token, next_token + fresh)]
        next_token += fresh
        tokens += previous
    return lengths, np.array(tokens), next_token


@given(packs())
def test_buckets_hold_every_sample_once_by_descending_length(pack):
    lengths, tokens, _ = pack
    buckets = Segments(lengths, CPU, tokens).buckets
    assert sum(bucket.rows for bucket in buckets) == len(lengths)
    widths = [bucket.width for bucket in buckets]
    assert widths == sorted(widths, reverse=True)
    assert [b.start for b in buckets] == np.cumsum([0, *(b.rows * b.width for b in buckets)])[:-1].tolist()


@given(packs())
def test_what_is_spread_can_be_collected(pack):
    lengths, tokens, num_tokens = pack
    segments = Segments(lengths, CPU, tokens)
    x = torch.randn(num_tokens, 3)
    for cells in (segments.bucketed, segments.end_to_end):
        assert torch.equal(cells.collect(cells.spread(x)), x)


@given(packs())
def test_end_to_end_cells_are_the_samples_one_after_another(pack):
    lengths, tokens, num_tokens = pack
    segments = Segments(lengths, CPU, tokens)
    assert segments.end_to_end.spread(torch.arange(num_tokens)).tolist() == tokens.tolist()
    assert segments.offsets.tolist() == [0, *np.cumsum(lengths)]


@given(packs())
def test_gradients_are_those_of_plain_indexing(pack):
    lengths, tokens, num_tokens = pack
    segments = Segments(lengths, CPU, tokens)
    for cells in (segments.bucketed, segments.end_to_end):
        x = torch.randn(num_tokens, 2, dtype=torch.float64, requires_grad=True)
        weights = torch.randn(cells.num_cells, 2, dtype=torch.float64)
        weights[torch.from_numpy(cells._token_of_cell_C < 0)] = 0.0
        (mine,) = torch.autograd.grad((cells.spread(x) * weights).sum(), x)
        (expected,) = torch.autograd.grad((x[cells.token_of_cell] * weights).sum(), x)
        torch.testing.assert_close(mine, expected)
        y = torch.randn(cells.num_cells, 2, dtype=torch.float64, requires_grad=True)
        weights = torch.randn(num_tokens, 2, dtype=torch.float64)
        (mine,) = torch.autograd.grad((cells.collect(y) * weights).sum(), y)
        (expected,) = torch.autograd.grad((y[cells.first_cell_of_token] * weights).sum(), y)
        torch.testing.assert_close(mine, expected)


def test_equal_lengths_that_share_nothing_are_left_where_they_are():
    segments = Segments([7, 7, 7], CPU)
    assert segments.bucketed.is_identity
    assert segments.end_to_end.is_identity


def test_very_different_lengths_do_not_share_a_bucket():
    assert [bucket.rows for bucket in Segments([60, 500, 58, 490], CPU).buckets] == [2, 2]
