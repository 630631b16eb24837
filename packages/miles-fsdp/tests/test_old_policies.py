"""--keep-old-actor on shards: tokens are scored by the weights that made them, also after a resume."""

import numpy as np
import pytest

from miles.core.protocols.backend import Rank
from miles.fsdp.backend import FsdpBackend


def made_by(batch, version):
    return batch.having({"weight_versions": tuple(np.full(r, version) for r in batch.response_lengths)})


def two_parts(make, rollout, directory):
    """Steps on a rollout that older weights made, in one go and after a resume."""
    actor = make()
    actor.keep_weights(0)
    expected = actor.log_probs(rollout(1))
    actor.train(made_by(rollout(0), 0))
    actor.keep_weights(1)
    directory.mkdir(exist_ok=True)
    actor.save(directory)
    batch = made_by(rollout(1), 0).having({"rollout_log_probs": expected})
    report = actor.train(batch)
    actor.close()
    resumed = make()
    resumed.load(directory)
    resumed.keep_weights(1)
    return report.steps, resumed.train(batch).steps


def check(steps, resumed):
    # The trainer's old log-probabilities are compared with those that the weights gave while they were in the model.
    assert steps[0]["train/train_rollout_logprob_abs_diff"] == pytest.approx(0.0, abs=1e-6)
    assert abs(steps[0]["train/ppo_kl"]) > 1e-4
    assert resumed == steps


FLAGS = {"keep_old_actor": True, "async_training": True}


def test_one_rank_scores_by_the_weights_that_generated(actor, rollout, tmp_path):
    check(*two_parts(lambda: actor(**FLAGS), rollout, tmp_path / "state"))


def test_shards_score_by_the_weights_that_generated(config, on_ranks, rollout, tmp_path):
    def run(rank: Rank):
        settings = config(**FLAGS, actor_num_gpus_per_node=2)
        return two_parts(lambda: FsdpBackend().create(settings, rank), rollout, tmp_path / "state")

    for steps, resumed in on_ranks(2, run):
        check(steps, resumed)
