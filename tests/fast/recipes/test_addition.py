import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

import addition
from addition import Task, column_addition, terms, write_data

SMALL = Task(num_demonstrations=500, num_train=300, num_eval=50)


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"), SMALL, seed=0)


def questions(data):
    shown = [row["messages"][0]["content"] for row in rows(data.demonstrations)]
    trained = [row["prompt"][0]["content"] for row in rows(data.train)]
    held_out = [row["prompt"][0]["content"] for row in rows(data.evaluation)]
    return shown, trained, held_out


def sums(texts):
    return {frozenset(text.removeprefix("Calculate ").removesuffix(".").split(" + ")) for text in texts}


def test_held_out_sums_are_never_shown_in_either_order(data):
    shown, trained, held_out = questions(data)
    assert len(held_out) == len(sums(held_out)) == SMALL.num_eval
    assert not sums(held_out) & (sums(shown) | sums(trained))


def test_held_out_sums_are_the_same_for_every_seed(data, tmp_path):
    other = write_data(tmp_path, SMALL, seed=1)
    assert other.evaluation.read_bytes() == data.evaluation.read_bytes()
    assert other.train.read_bytes() != data.train.read_bytes()
    assert sums(questions(other)[1]) != sums(questions(data)[1])


def test_the_same_seed_makes_the_same_bytes(data, tmp_path):
    again = write_data(tmp_path, SMALL, seed=0)
    for name in ("demonstrations", "train", "evaluation"):
        assert getattr(again, name).read_bytes() == getattr(data, name).read_bytes()


def test_some_demonstrations_think(data):
    answers = [row["messages"][1]["content"] for row in rows(data.demonstrations)]
    thinking = sum(not answer.startswith("<think></think>") for answer in answers)
    assert 0.3 < thinking / len(answers) < 0.5


def test_every_demonstration_ends_in_the_right_answer(data):
    for row in rows(data.demonstrations):
        question, answer = (turn["content"] for turn in row["messages"])
        numbers = question.removeprefix("Calculate ").removesuffix(".").split(" + ")
        assert answer.rpartition("</think>")[2] == str(sum(map(int, numbers)))


def test_rows_carry_what_the_verifier_needs(data):
    import reasoning_gym

    for row in rows(data.train)[:20]:
        score = reasoning_gym.get_score_answer_fn(row["metadata"]["source_dataset"])
        entry = {"answer": row["label"], "metadata": row["metadata"]}
        assert score(row["label"], entry) == 1.0


def test_columns_are_added_units_first():
    assert column_addition(("814", "707")) == "4+7+0=11 1+0+1=02 8+7+0=15"
    assert column_addition(("1000", "21")) == "0+1+0=01 0+2+0=02 0+0+0=00 1+0+0=01"


@given(a=st.integers(0, 10**6), b=st.integers(0, 10**6))
def test_columns_spell_the_sum(a, b):
    columns = [column.split("=")[1] for column in column_addition((str(a), str(b))).split(" ")]
    digits = columns[-1] + "".join(column[1] for column in reversed(columns[:-1]))
    assert int(digits) == a + b


def test_terms_are_the_numbers_as_written():
    assert terms(next(addition.problems(Task(), 1, 0)))[0].isdigit()
