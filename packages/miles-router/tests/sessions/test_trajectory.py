"""Which requests continue a session, and with which token ids."""

from __future__ import annotations

import pytest

from miles.core.continuation import Continuation
from miles.router.sessions.messages import BadMessageError
from miles.router.sessions.trajectory import Generation, Plan, Trajectory, Turn, accumulate, make_plan

TOOLS = [{"type": "function", "function": {"name": "f"}}]


def user(text):
    return {"role": "user", "content": text}


def said(text):
    return {"role": "assistant", "content": text}


def generation(output):
    return Generation(output, [-1.0] * len(output), "stop", ["1"], [1] * len(output))


def turn(question, answer, added, output, trimmed=0):
    return Turn([user(question)], said(answer), trimmed, added, generation(output))


@pytest.fixture
def two_turns():
    return Trajectory([turn("a", "b", [1, 2], [3, 4]), turn("c", "d", [5], [6], trimmed=1)], TOOLS)


def test_ids_grow_at_the_end(two_turns):
    assert two_turns.ids == [1, 2, 3, 5, 6]
    assert [message["content"] for message in two_turns.messages()] == list("abcd")


def test_request_with_all_turns_continues_them(two_turns):
    messages = [user("a"), said("b"), user("c"), said("d"), user("e")]
    assert two_turns.kept_turns(messages, None) == 2
    assert two_turns.kept_turns(messages, TOOLS) == 2


@pytest.mark.parametrize(
    "messages",
    [
        [user("a"), said("b"), user("c")],
        [user("a"), said("b"), user("other")],
        [user("a"), said("b"), user("c"), said("edited"), user("e")],
    ],
)
def test_last_turn_can_be_replaced(two_turns, messages):
    if messages[-2] == said("edited"):
        with pytest.raises(BadMessageError, match="not generated in this session"):
            two_turns.kept_turns(messages, None)
    else:
        assert two_turns.kept_turns(messages, None) == 1


def test_reaching_further_back_is_refused(two_turns):
    with pytest.raises(BadMessageError, match="continue 0 of the session's 2 turns"):
        two_turns.kept_turns([user("other")], None)


def test_first_request_may_have_turns_of_others():
    assert Trajectory().kept_turns([user("a"), said("b"), user("c")], TOOLS) == 0


def test_first_turn_can_be_replaced_with_other_tools():
    trajectory = Trajectory([turn("a", "b", [1], [2])], TOOLS)
    assert trajectory.kept_turns([user("x")], None) == 0
    trajectory.commit(Plan(0, [user("x")], 0, [9], [9]), turn("x", "y", [9], [8]), None)
    assert (trajectory.ids, trajectory.tools) == ([9, 8], None)


def test_other_tools_are_refused(two_turns):
    messages = [*two_turns.messages(), user("e")]
    with pytest.raises(BadMessageError, match="'tools' differ"):
        two_turns.kept_turns(messages, [{"type": "function", "function": {"name": "g"}}])


def test_commit_takes_the_replaced_turn_back(two_turns):
    two_turns.commit(Plan(1, [user("x")], 0, [7], [1, 2, 3, 4, 7]), turn("x", "y", [7], [8]), None)
    assert two_turns.ids == [1, 2, 3, 4, 7, 8]
    assert two_turns.tools == TOOLS


def test_plan_drops_an_end_token_that_gives_way(template):
    made = template("chatml")
    encode = made.tokenizer.encode
    first = encode(made.render([user("a")], prompt=True))
    turns = [Turn([user("a")], said("b"), 0, first, generation(encode("b<|endoftext|>")))]
    messages = [user("a"), said("b"), user("c")]
    plan = make_plan(made, Continuation(made), turns, messages, None, {})
    assert plan.trimmed == 1
    assert plan.ids == encode(made.render(messages, prompt=True))
    assert plan.messages == [user("c")]
    following = Turn(plan.messages, said("d"), plan.trimmed, plan.added, generation([6]))
    assert accumulate([*turns, following]) == [*plan.ids, 6]
