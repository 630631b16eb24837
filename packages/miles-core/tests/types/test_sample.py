import pytest

from miles.core.types import Sample, Status


def generated(**values) -> Sample:
    fields = {"index": 3, "tokens": [5, 6, 7, 8], "response_length": 2, "rollout_log_probs": [-1.0, -2.0]}
    return Sample(**fields | values)


def test_prompt_and_response_split_the_tokens():
    sample = generated()
    assert sample.prompt_length == 2
    assert sample.response_tokens == [7, 8]


def test_masked_tokens_are_not_counted_as_effective():
    assert generated().effective_response_length == 2
    assert generated(loss_mask=[0, 1]).effective_response_length == 1


def test_reward_is_a_number_or_an_entry_of_a_mapping():
    assert generated(reward=0.5).reward_value(None) == 0.5
    assert generated(reward={"score": 1, "acc": True}).reward_value("score") == 1.0


def test_mapping_without_a_key_says_which_there_are():
    with pytest.raises(ValueError, match=r"sample 3: .*\['acc', 'score'\]; set --reward-key"):
        generated(reward={"score": 1, "acc": True}).reward_value(None)


def test_missing_reward_names_the_sample_and_its_status():
    with pytest.raises(ValueError, match=r"sample 3 has no reward \(status aborted\)"):
        generated(status=Status.ABORTED).reward_value(None)


@pytest.mark.parametrize(
    ("reason", "status"),
    [("stop", "completed"), ("length", "truncated"), ("abort", "aborted"), ("else", "pending"), (None, "pending")],
)
def test_finish_reason_sets_the_status(reason, status):
    sample = generated()
    sample.finish(reason)
    assert sample.status == status


def test_retry_keeps_identity_and_forgets_the_response():
    sample = generated(prompt="p", label=1, metadata={"a": 1}, reward=1.0, status=Status.FAILED)
    sample.reset_for_retry()
    assert sample == Sample(index=3, prompt="p", label=1, metadata={"a": 1})


def test_lengths_that_disagree_are_named():
    with pytest.raises(ValueError, match="rollout_log_probs has 1 entries, the response has 2"):
        generated(rollout_log_probs=[-1.0]).validate()
    with pytest.raises(ValueError, match="response_length is 9, but there are 4 tokens"):
        generated(response_length=9, rollout_log_probs=None).validate()
    generated().validate()


def test_sample_survives_its_mapping_and_keeps_unknown_keys():
    sample = generated(reward={"score": 1.0}, status=Status.TRUNCATED)
    assert Sample.from_dict(sample.to_dict()) == sample
    assert Sample.from_dict(sample.to_dict() | {"colour": "red"}).metadata == {"colour": "red"}
