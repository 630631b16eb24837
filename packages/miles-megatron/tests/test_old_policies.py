"""--keep-old-actor on divided layers: tokens are scored by the weights that made them, also after a resume."""

import numpy as np
import pytest

SP = {"tensor_model_parallel_size": 2, "sequence_parallel": True}


def made_by(batch, version):
    return batch.having({"weight_versions": tuple(np.full(r, version) for r in batch.response_lengths)})


@pytest.mark.slow
def test_old_log_probabilities_are_those_of_the_kept_weights_also_after_a_resume(config, rollout, on_ranks, tmp_path):
    flags = {"keep_old_actor": True, "num_steps_per_rollout": 2, "async_training": True} | SP

    def first(make):
        actor = make(config(**flags))
        actor.keep_weights(0)
        batch = made_by(rollout(1), 0)
        expected = actor.log_probs(batch)
        actor.train(made_by(rollout(0), 0))
        actor.keep_weights(1)
        actor.save(tmp_path)
        return expected, actor.train(batch.having({"rollout_log_probs": expected}))

    expected, report = on_ranks(2, first)[0]
    # The trainer's old log-probabilities are compared with those that the weights gave while they were in the model.
    assert report.steps[0]["train/train_rollout_logprob_abs_diff"] == pytest.approx(0.0, abs=1e-6)
    assert abs(report.steps[0]["train/ppo_kl"]) > 1e-4

    def second(make):
        actor = make(config(**flags))
        actor.load(tmp_path)
        actor.keep_weights(1)
        return actor.train(made_by(rollout(1), 0).having({"rollout_log_probs": expected}))

    resumed = on_ranks(2, second)[0]
    assert resumed.steps == report.steps
