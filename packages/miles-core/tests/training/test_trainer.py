"""The training procedure over a table of logits: next token from present token alone."""

import math

import numpy as np
import pytest
import torch
from table_models import VOCABULARY, TableModel, make_batch, make_trainer

from miles.core.errors import TrainingError


def test_one_step_takes_one_pass_over_the_samples():
    model = TableModel()
    make_trainer(model).train(make_batch())
    assert (model.forwards, model.scorings) == (3, 0)


def test_the_model_gets_all_micro_batches_of_a_step_at_once():
    model = TableModel()
    make_trainer(model, num_steps_per_rollout=2).train(make_batch())
    assert (model.accumulations, model.forwards) == (2, 4)


def test_several_steps_take_a_scoring_pass_first():
    model = TableModel()
    report = make_trainer(model, num_steps_per_rollout=2).train(make_batch())
    assert (model.forwards, model.scorings, len(report.steps)) == (4, 4, 2)


def test_the_engines_log_probs_as_old_ones_take_no_scoring_pass():
    batch = make_batch()
    batch = make_batch(rollout_log_probs=tuple(np.full(r, -2.0, np.float32) for r in batch.response_lengths))
    model = TableModel()
    report = make_trainer(model, use_rollout_logprobs=True, num_steps_per_rollout=2).train(batch)
    assert model.scorings == 0
    assert report.steps[0]["train/ppo_kl"] != 0.0


def test_the_reference_scores_once_per_micro_batch_and_is_reported():
    reference = TableModel(seed=1)
    report = make_trainer(reference=reference, use_kl_loss=True, kl_loss_coef=0.1).train(make_batch())
    assert (reference.scorings, reference.forwards) == (3, 0)
    assert "rollout/ref_log_probs" in report.metrics
    assert "ref_log_probs" in report.timings


def test_log_probabilities_have_a_cap_of_their_own():
    dynamic = {"use_dynamic_batch_size": True, "max_tokens_per_gpu": 20, "num_steps_per_rollout": 2}
    found = []
    for own in ({}, {"log_probs_max_tokens_per_gpu": 10_000}):
        model, reference = TableModel(), TableModel(seed=1)
        trainer = make_trainer(model, reference, use_kl_loss=True, kl_loss_coef=0.1, **dynamic, **own)
        metrics = trainer.train(make_batch()).metrics
        found.append((model.scorings, reference.scorings, model.forwards, metrics["rollout/log_probs"]))
    (scorings, _, forwards, logp), own = found
    assert scorings == forwards > 1
    assert own == (1, 1, forwards, pytest.approx(logp))


def test_a_teacher_of_the_trainers_own_scores_what_rollouts_do_not_bring():
    teacher, batch = TableModel(seed=1), make_batch()
    report = make_trainer(teacher=teacher, use_opd=True).train(batch)
    assert teacher.scorings == 3
    assert "teacher_log_probs" in report.timings
    given = batch.having({"teacher_log_probs": make_trainer(TableModel(seed=1)).log_probs(batch)})
    assert make_trainer(use_opd=True).train(given).steps == report.steps


def test_entropy_is_reported_when_asked_for():
    assert "rollout/entropy" not in make_trainer().train(make_batch()).metrics
    for flags in ({}, {"num_steps_per_rollout": 2}):
        metrics = make_trainer(use_rollout_entropy=True, **flags).train(make_batch()).metrics
        assert 0 < metrics["rollout/entropy"] < math.log(VOCABULARY)


def test_columns_of_the_rollout_are_averaged_over_samples():
    batch = make_batch()
    metrics = make_trainer().train(batch).metrics
    assert metrics["rollout/raw_reward"] == pytest.approx(np.mean(batch.raw_rewards))
    assert metrics["rollout/response_lengths"] == np.mean(batch.response_lengths)
    assert metrics["rollout/truncated"] == 0.5
    assert metrics["rollout/advantages"] == pytest.approx(np.mean(batch.rewards), abs=1e-6)


def test_log_probs_of_a_single_step_are_those_before_it():
    batch, model = make_batch(), TableModel()
    expected = make_trainer(TableModel(), num_steps_per_rollout=2).train(batch).metrics["rollout/log_probs"]
    assert make_trainer(model).train(batch).metrics["rollout/log_probs"] == pytest.approx(expected)


def test_steps_are_counted_over_rollouts_for_the_schedule():
    trainer = make_trainer(num_steps_per_rollout=2, lr=1.0, lr_warmup_iters=4)
    rates = [step["train/lr-pg_0"] for _ in range(2) for step in trainer.train(make_batch()).steps]
    assert rates == [0.0, 0.25, 0.5, 0.75]
    assert trainer.steps_done == 4


def test_the_optimizer_is_reset_when_asked():
    model = TableModel()
    trainer = make_trainer(model, reset_optimizer_states=True)
    trainer.train(make_batch())
    trainer.train(make_batch())
    assert model.resets == 2


def test_a_gradient_that_is_not_finite_is_an_error_and_no_step():
    model = TableModel()
    trainer = make_trainer(model)
    model.step = lambda learning_rate: math.inf
    with pytest.raises(TrainingError, match="norm of the gradient is inf: rollout 3, optimizer step 0; every sample's"):
        trainer.train(make_batch())
    assert trainer.steps_done == 0


def test_scores_that_are_not_finite_name_their_samples():
    model = TableModel()
    with torch.no_grad():
        model.table[5] = math.nan
    batch = make_batch()
    broken = [i for i, t, r in zip(batch.sample_indices, batch.tokens, batch.response_lengths) if 5 in t[-r - 1 : -1]]
    for flags in ({}, {"num_steps_per_rollout": 2}):
        with pytest.raises(TrainingError) as caught:
            make_trainer(model, **flags).train(batch)
        assert str(broken) in str(caught.value)


@pytest.mark.parametrize("steps", [1, 2])
def test_steps_on_scores_that_are_not_finite_can_be_skipped(caplog, steps):
    model, batch = TableModel(), make_batch()
    with torch.no_grad():
        model.table[int(batch.tokens[0][-2])] = math.nan
    report = make_trainer(model, nonfinite_step="skip", num_steps_per_rollout=steps).train(batch)
    assert report.steps[0]["train/skipped"] == 1.0
    assert str(batch.sample_indices[0]) in caplog.text
    assert steps == 1 or "log-probabilities that are not finite" in caplog.text


@pytest.mark.parametrize(
    ("flags", "missing"),
    [({"use_tis": True}, "--use-tis"), ({"advantage_estimator": "on_policy_distillation"}, "of a teacher")],
)
def test_log_probs_that_the_rollout_should_have_brought_are_named(flags, missing):
    with pytest.raises(TrainingError, match=missing):
        make_trainer(**flags).train(make_batch())


def test_a_response_without_prompt_is_refused():
    batch = make_batch(tokens=tuple(np.arange(r) for r in make_batch().response_lengths))
    with pytest.raises(TrainingError, match=r"the samples \[40, 41, .* have no prompt token"):
        make_trainer().train(batch)


def nan_once(rollouts):
    """A model whose first gradients are not finite."""

    class Model(TableModel):
        def accumulate(self, micro_batches, output, loss):
            super().accumulate(micro_batches, output, loss)
            if rollouts.pop(0):
                self.table.grad.fill_(math.nan)

    return Model()


def test_a_step_that_is_not_finite_can_be_skipped(caplog):
    model = nan_once([True, False])
    trainer, before = make_trainer(model, nonfinite_step="skip", lr_warmup_iters=2), model.table.detach().clone()
    first = trainer.train(make_batch()).steps[0]
    assert first == {"train/skipped": 1.0, "train/lr-pg_0": 0.0}
    assert "optimizer step skipped: the norm of the gradient is nan" in caplog.text
    assert torch.equal(model.table, before)
    assert trainer.steps_done == 0, "a step that was not taken does not count for the schedule"
    assert trainer.train(make_batch()).steps[0]["train/skipped"] == 0.0


def test_a_skipped_loss_leaves_no_gradient_behind():
    model, batch = TableModel(), make_batch()
    broken = make_batch(rewards=(math.nan, *batch.rewards[1:]))
    step = make_trainer(model, nonfinite_step="skip").train(broken).steps[0]
    assert step["train/skipped"] == 1.0
    assert model.table.grad is None
