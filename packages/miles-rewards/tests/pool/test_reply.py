import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from miles.rewards.pool.reply import Answers, Failure, read_reply

scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=300)
values = st.recursive(scalars, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner) | st.tuples(inner))


def note(answers, value, seconds):
    """As the worker's loop does it."""
    answers.codes.append(answers.code(value)[0])
    answers.seconds.append(seconds)


@settings(max_examples=40, deadline=None)
@given(st.lists(values, max_size=8))
def test_values_arrive_as_json_would_carry_them(returned):
    answers = Answers(batch=7, first=3)
    for value in returned:
        note(answers, value, 0.5)
    reply = read_reply(answers.packed(stopped=False))
    assert (reply.batch, reply.first, reply.stopped) == (7, 3, False)
    assert [result.value for result in reply.results] == json.loads(json.dumps(returned))
    assert all((result.status, result.seconds) == ("ok", 0.5) for result in reply.results)


def test_a_constant_travels_once():
    one, many = Answers(1, 0), Answers(1, 0)
    verdict = (1.0, "correct")
    note(one, verdict, 0.1)
    for _ in range(1000):
        note(many, verdict, 0.1)
    assert len(many.packed(stopped=False)) == len(one.packed(stopped=False)) + 999 * 6


def test_errors_say_why_and_have_no_value():
    answers = Answers(1, 0)
    note(answers, Failure("ValueError: no"), 0.25)
    note(answers, object(), 0.25)
    first, second = read_reply(answers.packed(stopped=True)).results
    assert (first.status, first.value, first.detail) == ("error", None, "ValueError: no")
    assert "not plain data" in second.detail


@pytest.mark.parametrize("cut", [0, 5, 17, 30, -1])
def test_a_message_that_is_cut_off_is_no_answer(cut):
    answers = Answers(1, 0)
    note(answers, (1.0, "correct"), 0.1)
    with pytest.raises((ValueError, TypeError, LookupError)):
        read_reply(answers.packed(stopped=False)[:cut])


@given(st.binary(max_size=80))
def test_noise_is_no_answer_or_an_empty_one(noise):
    try:
        reply = read_reply(noise)
    except (ValueError, TypeError, LookupError):
        return
    assert len(reply.results) <= len(noise)
