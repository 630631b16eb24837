import numpy as np
import pytest
import torch

from miles.core.errors import EngineError, WeightSyncError
from miles.core.weights import probe

TRAINED = np.linspace(-3, -1, len(probe.TOKENS) - 1).astype(np.float32)


def answer(logps):
    scored = [[None, probe.TOKENS[0], None]]
    scored += [[float(logp), token, None] for logp, token in zip(logps, probe.TOKENS[1:], strict=True)]
    return {"meta_info": {"input_token_logprobs": scored}}


def test_equal_log_probs_prove_the_weights(engines):
    engines[0].answers["/generate"] = answer(TRAINED + 1e-6)
    assert probe.check([engines[0].url], TRAINED, ["a"], limit=2e-3) == pytest.approx(1e-6, rel=0.5)
    assert engines[0].payloads["/generate"]["input_ids"] == list(probe.TOKENS)


@pytest.mark.parametrize("logps", [TRAINED - 1, TRAINED * np.nan])
def test_other_log_probs_end_the_run_and_name_what_was_never_sent(engines, logps):
    engines[0].answers["/generate"] = answer(logps)
    engines[0].answers["/weights_checker"] = {"ranks": [{"checksums": {"a": "1", "b": "2"}}]}
    with pytest.raises(WeightSyncError, match=r"does not compute what the trainer computes.*never sent: b$"):
        probe.check([engines[0].url], TRAINED, ["a"], limit=2e-3)
    with pytest.raises(WeightSyncError, match=r"Every tensor it holds was sent: look at the model's configuration"):
        probe.check([engines[0].url], TRAINED, ["a", "b"], limit=2e-3)
    engines[0].refuses.add("/weights_checker")
    with pytest.raises(WeightSyncError, match=r"does not tell which tensors"):
        probe.check([engines[0].url], TRAINED, ["a"], limit=2e-3)


def test_a_difference_under_an_adapter_points_at_what_lies_under_it(engines):
    engines[0].answers["/generate"] = answer(TRAINED - 1)
    with pytest.raises(WeightSyncError, match=r"It was sent an adapter alone: .*--lora-serving merged"):
        probe.check([engines[0].url], TRAINED, ["a.lora_A.weight", "a.lora_B.weight"], limit=2e-3)


def test_an_engine_that_does_not_score_prompts_is_named(engines):
    with pytest.raises(EngineError, match=f"{engines[0].url}: /generate gave no log-probabilities"):
        probe.check([engines[0].url], TRAINED, [], limit=1)


def test_half_precision_is_given_more_room():
    assert probe.tolerance(torch.bfloat16) > probe.tolerance(torch.float32)


def test_the_prompt_as_samples():
    batch = probe.batch(2)
    assert len(batch) == 2
    assert batch.response_lengths == (15, 15)
    assert max(probe.TOKENS) < 64
