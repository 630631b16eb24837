import pytest

from miles.rewards.types.ifbench import grade

pytest.importorskip("nltk")

TWO = {"instruction_id_list": ["punctuation:no_comma", "startend:quotation"], "kwargs": [{}, {}]}


def test_all_instructions_must_be_followed():
    assert grade('"a"', None, TWO) == (1.0, "correct")
    assert grade('"a, b"', None, TWO) == (0.0, "wrong")


def test_the_share_of_followed_instructions_is_the_reward_when_it_is_asked_for():
    assert grade('"a, b"', None, TWO | {"partial": True}) == (0.5, "partly")


def test_reasoning_is_not_judged():
    assert grade('<think>well, well</think>"a"', None, TWO) == (1.0, "correct")


def test_an_empty_response_follows_nothing():
    assert grade("<think>no, no</think> ", None, TWO) == (0.0, "no_answer")


@pytest.mark.parametrize(
    "metadata",
    [
        {},
        {"instruction_id_list": ["count:sheep"], "kwargs": [{}]},
        {"instruction_id_list": ["count:numbers"], "kwargs": [{"N": None}]},
        {"instruction_id_list": ["count:numbers"], "kwargs": None},
        {"instruction_id_list": ["sentence:keyword"], "kwargs": [{"word": "a", "N": "two"}]},
    ],
)
def test_faulty_data_is_named_and_not_taken_for_a_wrong_answer(metadata):
    assert grade("a", None, metadata) == (0.0, "bad_label")


def test_one_mapping_of_arguments_serves_all_instructions():
    metadata = {"instruction_id_list": ["count:numbers", "count:person_names"], "kwargs": {"N": 1}}
    assert grade("Emma has 3", None, metadata) == (1.0, "correct")
