from miles.core.report.samples import (
    HEAD_TOKENS,
    MAX_ROLLOUTS,
    TAIL_TOKENS,
    comparisons,
    prompt_text,
    rollout_groups,
    sample_json,
)


def row(length, **fields):
    return {
        "tokens": list(range(5 + length)),
        "response": "x" * length,
        "pieces": ["x"] * length,
        "response_length": length,
        "reward": 1.0,
        **fields,
    }


def test_the_first_and_the_last_evaluation_are_compared_prompt_by_prompt(run):
    (comparison,) = comparisons(run, None)
    assert (comparison["dataset"], comparison["before"], comparison["after"]) == ("sums", 0, 40)
    assert sum(comparison["counts"].values()) == 6
    became_right = [pair for pair in comparison["pairs"] if pair["kind"] == "became right"]
    assert became_right
    assert all(pair["before"]["reward"] < 1 <= pair["after"]["reward"] for pair in became_right)


def test_some_rollouts_are_shown_the_first_and_the_last_among_them(run):
    shown = rollout_groups(run, None)
    assert len(shown) == MAX_ROLLOUTS
    assert (shown[0]["rollout_id"], shown[-1]["rollout_id"]) == (0, 39)
    assert [group["size"] for group in shown[0]["groups"]] == [4, 4]


def test_tokens_carry_text_id_log_probability_and_whether_they_train():
    sample = sample_json(row(2, rollout_log_probs=[-0.12345678, -2.0], loss_mask=[1, 0]), None)
    assert sample["tokens"] == [["x", 5, -0.1235, 1], ["x", 6, -2.0, 0]]


def test_a_removed_sample_trains_no_token():
    assert [token[3] for token in sample_json(row(3, remove_sample=True), None)["tokens"]] == [0, 0, 0]


def test_the_middle_of_a_long_response_is_left_out():
    sample = sample_json(row(HEAD_TOKENS + TAIL_TOKENS + 50), None)
    assert sample["head"] == HEAD_TOKENS
    assert len(sample["tokens"]) == HEAD_TOKENS + TAIL_TOKENS
    assert sample["tokens"][HEAD_TOKENS][1] == 5 + HEAD_TOKENS + 50


def test_without_pieces_the_response_is_one_piece():
    sample = sample_json(row(2, pieces=None), None)
    assert [token[0] for token in sample["tokens"]] == ["xx", ""]


def test_conversations_are_shown_turn_by_turn():
    assert prompt_text([{"role": "user", "content": "Hi"}]) == "user: Hi"


def test_the_answer_to_imitate_is_not_part_of_the_question():
    turns = [{"role": "user", "content": "1 + 1"}, {"role": "assistant", "content": "2"}]
    assert prompt_text(turns) == "user: 1 + 1"
    assert sample_json(row(2), None, scored=False)["reward"] is None
