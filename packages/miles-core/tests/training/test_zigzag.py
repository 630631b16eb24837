import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from miles.core.training.zigzag import ZigZag

LENGTHS = st.lists(st.integers(0, 40), min_size=1, max_size=8)


def divided(lengths, count):
    starts = np.cumsum(lengths) - lengths
    return ZigZag([(int(start), length) for start, length in zip(starts, lengths, strict=True) if length], count)


@given(LENGTHS.filter(any), st.integers(1, 5))
def test_every_token_has_one_place_and_no_rank_more_than_its_share(lengths, count):
    zigzag = divided(lengths, count)
    own = [zigzag.tokens(rank) for rank in range(count)]
    assert sorted(np.concatenate(own)) == list(range(sum(lengths)))
    assert zigzag.width == max(map(len, own)) == -(-sum(lengths) // count)


@given(LENGTHS.filter(any), st.integers(1, 5))
def test_the_tokens_of_all_ranks_end_to_end_hold_each_at_its_place(lengths, count):
    zigzag = divided(lengths, count)
    gathered = np.full(count * zigzag.width, -1)
    for rank in range(count):
        tokens = zigzag.tokens(rank)
        gathered[rank * zigzag.width : rank * zigzag.width + len(tokens)] = tokens
    assert (gathered[zigzag.gathered] == np.arange(sum(lengths))).all()


@given(st.integers(100, 10_000), st.integers(2, 8))
def test_all_ranks_have_nearly_the_same_work(length, count):
    """A token attends to as many tokens as its position says."""
    zigzag = divided([length], count)
    work = [int(zigzag.tokens(rank).sum()) for rank in range(count)]
    assert max(work) - min(work) <= 2 * length


def test_a_rank_holds_a_chunk_and_its_mirror_image():
    zigzag = divided([8], 2)
    assert [zigzag.tokens(rank).tolist() for rank in (0, 1)] == [[0, 1, 6, 7], [2, 3, 4, 5]]
