import torch
from hypothesis import given
from hypothesis import strategies as st

from miles.core.training.segments import Segments

CPU = torch.device("cpu")


@given(st.lists(st.integers(1, 300), min_size=1, max_size=40))
def test_buckets_cover_the_pack_in_order(lengths):
    buckets = Segments(lengths, CPU).buckets
    assert [b.start for b in buckets] == [0, *(b.stop for b in buckets[:-1])]
    assert buckets[-1].stop == sum(lengths)
    assert sum(b.rows for b in buckets) == len(lengths)


@given(st.lists(st.integers(1, 300), min_size=1, max_size=40))
def test_padding_and_unpadding_give_the_tokens_back(lengths):
    for bucket in Segments(lengths, CPU).buckets:
        tokens = torch.arange(bucket.stop - bucket.start)
        if bucket.token_of_cell is None:
            assert len(tokens) == bucket.rows * bucket.width
        else:
            assert torch.equal(tokens[bucket.token_of_cell][bucket.cell_of_token], tokens)


def test_equal_lengths_need_no_padding():
    (bucket,) = Segments([7, 7, 7], CPU).buckets
    assert (bucket.rows, bucket.width, bucket.token_of_cell) == (3, 7, None)


def test_very_different_lengths_do_not_share_a_bucket():
    assert [b.rows for b in Segments([500, 490, 60, 58], CPU).buckets] == [2, 2]


def test_offsets_are_where_segments_begin():
    assert Segments([3, 1, 2], CPU).offsets.tolist() == [0, 3, 4, 6]
