"""A policy with the log-probabilities of its engine: the engine's numbers, the trainer's gradient."""

import numpy as np
import pytest
import torch
from table_models import CPU, TableModel, make_batch, make_trainer

from miles.core.errors import TrainingError
from miles.core.training.columns import Columns
from miles.core.training.on_policy import OnPolicyModel, check_on_policy


class TableEngine:
    """The same table, with rounding of its own."""

    def __init__(self):
        self.table, self.scored = None, 0

    def facts(self):
        return {}

    def take(self, weights, adapter=None):
        ((_, table),) = weights
        self.table = table.detach().clone()

    def score(self, tokens, response_lengths):
        self.scored += len(tokens)
        return [self._score(*sample) for sample in zip(tokens, response_lengths, strict=True)]

    def _score(self, tokens, length):
        ids = torch.from_numpy(tokens)
        logp = self.table[ids[-length - 1 : -1]].double().log_softmax(-1)
        return logp.gather(1, ids[-length:, None])[:, 0].float().numpy() + np.float32(1e-3)


def on_policy(model, engine):
    return OnPolicyModel(model, engine, lambda: iter([("table", model.table)]))


def generated(engine, model, **changes):
    """A rollout with the log-probabilities that the engine has for it."""
    batch = make_batch()
    engine.take([("table", model.table)])
    scores = tuple(engine.score(batch.tokens, batch.response_lengths))
    engine.scored = 0
    return batch.having({"rollout_log_probs": scores} | changes)


def test_values_are_the_engines_and_gradients_the_trainers():
    plain, model, engine = TableModel(), TableModel(), TableEngine()
    batch = generated(engine, model)
    expected = make_trainer(plain).train(batch).steps[0]
    report = make_trainer(on_policy(model, engine), true_on_policy_mode=True).train(batch)
    assert report.steps[0]["train/train_rollout_logprob_abs_diff"] == 0.0
    assert expected["train/train_rollout_logprob_abs_diff"] > 0.0
    assert report.steps[0]["train/grad_norm"] == pytest.approx(expected["train/grad_norm"], rel=1e-5)
    torch.testing.assert_close(model.table, plain.table)


def test_a_response_is_scored_once_per_set_of_weights():
    model, engine = TableModel(), TableEngine()
    batch = generated(engine, model)
    make_trainer(on_policy(model, engine), true_on_policy_mode=True, num_steps_per_rollout=2).train(batch)
    assert engine.scored == 8 + 4  # all of them before the first step, and those of the second after it
    assert model.scorings == 0


def test_entropies_are_the_trainers_own():
    model, engine = TableModel(), TableEngine()
    flags = {"true_on_policy_mode": True, "use_rollout_entropy": True}
    metrics = make_trainer(on_policy(model, engine), **flags).train(generated(engine, model)).metrics
    plain = make_trainer(TableModel(), use_rollout_entropy=True).train(make_batch()).metrics
    assert metrics["rollout/entropy"] == pytest.approx(plain["rollout/entropy"])


def test_a_difference_in_the_last_bit_names_its_samples():
    model, engine = TableModel(), TableEngine()
    batch = generated(engine, model)
    batch.rollout_log_probs[5][0] = np.nextafter(batch.rollout_log_probs[5][0], np.float32(0))
    with pytest.raises(TrainingError, match=r"--true-on-policy-mode: rollout 3: .* in the samples \[45\]"):
        make_trainer(on_policy(model, engine), true_on_policy_mode=True).train(batch)


def test_masked_tokens_and_those_of_older_weights_are_not_compared():
    batch = make_batch()
    logps = tuple(np.zeros(r, np.float32) for r in batch.response_lengths)
    versions = [np.full(r, batch.rollout_id) for r in batch.response_lengths]
    off = [logp.copy() for logp in logps]
    off[0][0] = off[1][0] = 1.0
    batch.loss_masks[0][0] = 0.0
    versions[1][0] -= 1
    batch = batch.having({"rollout_log_probs": tuple(off), "weight_versions": tuple(versions)})
    columns = Columns.of(batch, CPU)
    columns.old_logp_A = torch.zeros_like(columns.mask_A)
    check_on_policy(batch, columns)
