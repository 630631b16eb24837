from array import array

from hypothesis import given
from hypothesis import strategies as st

from miles.rewards.pool.results import Result, Results, single

endings = st.tuples(st.sampled_from(["ok", "error"]), st.integers(), st.text(max_size=3))
columns = st.lists(st.tuples(endings, st.floats(0, 100, width=32)), max_size=12)


def results_of(pairs):
    return Results([ending for ending, _ in pairs], array("f", [seconds for _, seconds in pairs]))


@given(columns, st.integers(0, 12), st.integers(0, 12))
def test_they_are_a_sequence_of_results(pairs, start, stop):
    expected = [Result(*ending, seconds) for ending, seconds in pairs]
    results = results_of(pairs)
    assert list(results) == expected
    assert [results[place] for place in range(len(results))] == expected
    assert list(results[start:stop]) == expected[start:stop]
    assert all(type(result) is Result for result in results)


@given(columns.filter(bool), st.data())
def test_results_stand_where_they_are_put_and_the_rest_can_be_filled(pairs, data):
    start = data.draw(st.integers(0, 5))
    results = Results.pending(start + len(pairs) + 2)
    results.put(start, results_of(pairs))
    results.fill(Result("crash", detail="all over"))
    assert list(results[start : start + len(pairs)]) == list(results_of(pairs))
    assert {result.status for result in (*results[:start], *results[start + len(pairs) :])} == {"crash"}


def test_a_single_result_keeps_its_time():
    assert list(single(Result("timeout", detail="late", seconds=2.0))) == [Result("timeout", None, "late", 2.0)]
