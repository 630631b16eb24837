import pickle

from hypothesis import given
from hypothesis import strategies as st

from miles.rewards.pool.calls import Calls


def read(part):
    """The calls of a part, as a worker reads them."""
    calls, at, skip = [], 0, part.skip
    for length, count in zip(part.lengths, part.counts, strict=True):
        calls += pickle.loads(part.blocks[at : at + length])[skip : skip + count]
        at, skip = at + length, 0
    return calls


def packed(items):
    calls = Calls()
    assert not list(calls.pack(items))
    return calls


@given(st.integers(1, 150), st.data())
def test_any_part_holds_its_own_calls(count, data):
    odd = data.draw(st.sets(st.integers(0, count - 1), max_size=3))
    items = [(frozenset, place) if place in odd else (f"text {place}", place) for place in range(count)]
    start = data.draw(st.integers(0, count - 1))
    stop = data.draw(st.integers(start + 1, count))
    assert read(packed(items).part(start, stop)) == items[start:stop]


@given(st.lists(st.integers(1, 5), min_size=1, max_size=8), st.data())
def test_calls_that_fit_are_whole_blocks_and_those_of_one_at_least(sizes, data):
    calls = Calls()
    for size in sizes:
        calls.add(bytes(size), num_calls=size)
    start = data.draw(st.integers(0, len(calls) - 1))
    room = data.draw(st.integers(0, 40))
    fitting = calls.num_fitting(start, room)
    first = next(number for number in range(len(sizes)) if sum(sizes[: number + 1]) > start)
    alone = sum(sizes[: first + 1]) - start
    assert 1 <= alone <= fitting
    assert fitting == alone or calls.num_bytes(start, start + fitting) <= room


def test_neighbours_of_plain_data_stand_in_one_block():
    assert packed([("text", 1, {}, [None, 0.5])] * 32).part(0, 32).counts == [32]


def test_what_is_not_plain_data_stands_in_a_block_of_its_own():
    assert packed([("text", 1), (complex, 1)]).part(0, 2).counts == [1, 1]


def test_calls_that_share_a_mapping_get_one_each():
    shared = {}
    first, second = read(packed([(shared,), (shared,)]).part(0, 2))
    assert first[0] is not second[0]


def test_long_texts_stand_in_blocks_of_their_own():
    assert packed([("a" * 3_000_000,), ("b" * 3_000_000,)]).part(0, 2).counts == [1, 1]


def test_a_list_that_holds_itself_is_sent():
    knot = []
    knot.append(knot)
    again = read(packed([(1,), (knot,)]).part(1, 2))[0][0]
    assert again[0] is again


def test_a_call_of_other_than_plain_data_leaves_no_trace_in_those_after_it():
    items = [({"depth": [[0]]}, frozenset)] + [("text", place) for place in range(300)]
    part = packed(items).part(0, len(items))
    assert part.counts == [1] * 128 + [128, 45]
    assert read(part) == items


def test_what_cannot_be_pickled_is_named_and_left_out():
    calls = Calls()
    problems = list(calls.pack([(1,), (lambda: 0,), (3,)]))
    assert [place for place, _ in problems] == [1]
    assert read(calls.part(0, 2)) == [(1,), (3,)]
