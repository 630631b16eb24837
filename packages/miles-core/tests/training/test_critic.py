"""The critic's procedure over a table of values: one per present token."""

import math

import numpy as np
import pytest
import torch
from table_models import VOCABULARY, TableCritic, TableModel, make_batch, make_critic, make_trainer

from miles.core.errors import TrainingError


def test_values_are_those_of_the_states_before_the_tokens():
    model, batch = TableCritic(), make_batch()
    with torch.no_grad():
        model.table += torch.arange(VOCABULARY)
    values = make_critic(model).score(batch)["values"]
    for tokens, response, value in zip(batch.tokens, batch.response_lengths, values, strict=True):
        assert value.tolist() == tokens[-response - 1 : -1].tolist()


def test_one_step_goes_towards_the_returns():
    model, batch = TableCritic(), make_batch()
    critic = make_critic(model, optimizer="sgd", critic_lr=0.5)
    report = critic.train(batch.having(critic.score(batch)))
    gradient = np.zeros(VOCABULARY)
    for tokens, response, reward in zip(batch.tokens, batch.response_lengths, batch.rewards, strict=True):
        for token in tokens[-response - 1 : -1]:
            gradient[token] += 2 * (0.0 - reward) / response / len(batch)
    np.testing.assert_allclose(model.table.detach(), -0.5 * gradient, atol=1e-6)
    assert report.steps[0]["train/critic-value_loss"] == pytest.approx(np.mean(np.square(batch.rewards)))
    assert report.steps[0]["train/critic-grad_norm"] == pytest.approx(np.linalg.norm(gradient))


def test_values_explain_more_of_the_returns_with_every_rollout():
    model, batch = TableCritic(), make_batch()
    critic = make_critic(model, critic_lr=0.5, value_clip=100.0)
    explained = [
        critic.train(batch.having(critic.score(batch))).metrics["rollout/value_explained_variance"] for _ in range(5)
    ]
    assert explained == sorted(explained)
    assert explained[0] == 0.0 < explained[-1] <= 1.0


def test_the_learning_rate_and_its_warm_up_are_the_critics_own():
    model, batch = TableCritic(), make_batch()
    critic = make_critic(model, critic_lr=1.0, critic_lr_warmup_iters=4, lr_warmup_iters=100, num_steps_per_rollout=2)
    critic.train(batch.having(critic.score(batch)))
    critic.train(batch.having(critic.score(batch)))
    assert model.rates == [0.0, 0.25, 0.5, 0.75]
    assert critic.steps_done == 4


def test_actor_and_critic_share_returns_that_penalize_the_kl_divergence():
    flags = {"advantage_estimator": "ppo", "kl_coef": 0.5, "kl_loss_type": "k1"}
    batch, critic = make_batch(), make_critic(**flags)
    actor = make_trainer(TableModel(seed=1), reference=TableModel(seed=2), **flags)
    batch = batch.having(critic.score(batch))
    batch = batch.having(actor.score(batch))
    assert set(actor.score(batch)) == {"log_probs", "ref_log_probs"}
    expected = actor.train(batch).metrics
    found = critic.train(batch).metrics
    assert found["rollout/returns"] == expected["rollout/returns"] != pytest.approx(np.mean(batch.rewards))


def test_the_critic_needs_no_teacher():
    batch, critic = make_batch(), make_critic(use_opd=True)
    report = critic.train(batch.having(critic.score(batch)))
    assert report.metrics["rollout/returns"] == pytest.approx(np.mean(batch.rewards))


def test_an_actor_without_values_says_what_is_missing():
    with pytest.raises(TrainingError, match="critic's values"):
        make_trainer(advantage_estimator="ppo").train(make_batch())


def test_values_that_are_not_finite_name_their_samples():
    model, batch = TableCritic(), make_batch()
    with torch.no_grad():
        model.table[batch.tokens[2][-2]] = math.nan
    with pytest.raises(TrainingError, match=r"values .* not finite.*42"):
        make_critic(model).score(batch)


def test_optimizer_states_are_forgotten_when_asked():
    model, batch = TableCritic(), make_batch()
    critic = make_critic(model, reset_optimizer_states=True)
    critic.train(batch.having(critic.score(batch)))
    assert model.resets == 1
