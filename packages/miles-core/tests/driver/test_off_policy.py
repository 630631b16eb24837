import pytest

from miles.core.config import Config
from miles.core.driver.off_policy import warnings

SAMPLING = {
    "rollout_temperature": 1.0,
    "rollout_top_p": 1.0,
    "rollout_top_k": -1,
    "partial_rollout": False,
    "mask_offpolicy_in_partial_rollout": False,
}
"""What the rollout side's flags are by default; values for hooks where its package is not installed."""


def told(**values) -> str:
    return "\n".join(warnings(Config.of(**SAMPLING | values)))


def test_synchronous_training_is_not_warned_about():
    assert told() == ""


@pytest.mark.parametrize("values", [{"async_training": True}, {"partial_rollout": True}])
def test_old_samples_without_a_correction_are(values):
    assert "nothing corrects for it" in told(**values)
    for correction in ("use_rollout_logprobs", "use_tis", "use_rs"):
        assert told(**values, **{correction: True}) == ""


def test_masked_tokens_of_older_weights_need_no_correction():
    assert told(partial_rollout=True, mask_offpolicy_in_partial_rollout=True) == ""


def test_truncated_sampling_biases_the_engines_log_probabilities():
    assert "--rollout-top-p 0.9" in told(rollout_top_p=0.9, use_rollout_logprobs=True)
    assert "--rollout-top-k 20" in told(rollout_top_k=20, use_rollout_logprobs=True)
    assert told(rollout_top_p=0.9) == ""


def test_equal_responses_teach_nothing():
    assert "equal responses" in told(rollout_temperature=0.0, n_samples_per_prompt=4)
    assert told(rollout_temperature=0.0) == ""


def test_supervised_training_has_no_policy_to_be_off():
    assert told(async_training=True, loss_type="sft_loss") == ""
