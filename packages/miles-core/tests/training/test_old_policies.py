"""Old log-probabilities by the weights that made each token."""

import numpy as np
import pytest
import torch
from table_models import TableModel, make_batch, make_trainer

from miles.core.errors import TrainingError
from miles.core.math.logprobs import LogProbs
from miles.core.training.old_policies import OldPolicies
from miles.core.training.tagged_weights import TaggedWeights


def kept(model):
    """The model's old policies."""
    return OldPolicies(TaggedWeights(lambda: {"table": model.table}), model)


def made_by(batch, versions):
    """``batch`` whose samples were made by ``versions``, one after another."""
    numbers = [versions[i % len(versions)] for i in range(len(batch))]
    columns = tuple(np.full(r, v) for r, v in zip(batch.response_lengths, numbers, strict=True))
    return batch.having({"weight_versions": columns})


def log_probs(table, batch):
    model = TableModel()
    model.table = table
    return np.concatenate(make_trainer(model).log_probs(batch))


def test_every_token_is_scored_by_the_weights_that_made_it():
    model, batch = TableModel(), made_by(make_batch(), (2, 3))
    old = kept(model)
    first = model.table.detach().clone()
    old.keep(2)
    with torch.no_grad():
        model.table.add_(torch.randn(model.table.shape, generator=torch.Generator().manual_seed(5)))
    second = model.table.detach().clone()
    old.keep(3)
    trainer = make_trainer(model, old_policies=old, advantage_estimator="ppo", kl_coef=0.1, n_samples_per_prompt=1)
    scores = np.concatenate(trainer.score(batch.having({"ref_log_probs": _zeros(batch)}))["log_probs"])
    by_first, by_second = log_probs(first, batch), log_probs(second, batch)
    expected = np.where(np.concatenate(batch.weight_versions) == 2, by_first, by_second)
    np.testing.assert_array_equal(scores, expected)
    assert torch.equal(model.table.detach(), second)


def _zeros(batch):
    return tuple(np.zeros(r, np.float32) for r in batch.response_lengths)


def test_tokens_of_the_weights_that_train_are_scored_by_the_model_itself():
    class Model(TableModel):
        """One whose scores are not those of its weights alone, as with an engine's arithmetic."""

        def score(self, micro_batches, *, with_entropy=False):
            scores = super().score(micro_batches, with_entropy=with_entropy)
            return [LogProbs(logp_T - 1.0, entropy_T) for logp_T, entropy_T in scores]

    model, batch = Model(), make_batch()
    plain = TableModel()
    plain.table = model.table
    old = OldPolicies(TaggedWeights(lambda: {"table": model.table}), plain)
    for version in (batch.rollout_id - 1, batch.rollout_id):
        old.keep(version)
    batch = made_by(batch, (batch.rollout_id - 1, batch.rollout_id))
    trainer = make_trainer(model, old_policies=old, advantage_estimator="ppo", kl_coef=0.1, n_samples_per_prompt=1)
    scores = np.concatenate(trainer.score(batch.having({"ref_log_probs": _zeros(batch)}))["log_probs"])
    lower = np.concatenate(batch.weight_versions) == batch.rollout_id
    np.testing.assert_allclose(scores, log_probs(model.table, batch) - lower, atol=1e-6)


def test_one_step_on_older_samples_has_ratios_other_than_one():
    model = TableModel()
    old = kept(model)
    old.keep(2)
    with torch.no_grad():
        model.table.mul_(0.5)
    old.keep(3)
    trainer = make_trainer(model, old_policies=old)
    report = trainer.train(made_by(make_batch(), (2,)))
    assert report.steps[0]["train/ppo_kl"] != 0.0
    assert "log_probs" in report.timings


def test_samples_of_the_present_weights_take_no_pass_of_their_own():
    model = TableModel()
    old = kept(model)
    old.keep(3)
    report = make_trainer(model, old_policies=old).train(made_by(make_batch(), (3,)))
    assert model.scorings == 0
    assert report.steps[0]["train/ppo_kl"] == 0.0


def test_two_versions_are_kept_and_older_tokens_count_to_the_oldest():
    model = TableModel()
    old = kept(model)
    for version in (0, 4, 4, 8):
        old.keep(version)
    assert old.versions == [4, 8]
    assert old.version_of_tokens(made_by(make_batch(), (0, 4, 5, 8))).unique().tolist() == [4, 8]
    (found,) = {int(v) for v in old.version_of_tokens(made_by(make_batch(), (5,)))}
    assert found == 4


def test_a_rollout_that_does_not_say_what_made_it_is_refused():
    model = TableModel()
    old = kept(model)
    old.keep(3)
    with pytest.raises(TrainingError, match="token_weight_versions"):
        make_trainer(model, old_policies=old).train(make_batch())
