"""Whole optimizer steps against NumPy: scores, advantages, loss, reduction, gradient and update, without autograd.

The model is linear: an embedding of the present token, and a product with an output matrix.  The oracle computes the
loss of a step from its weights in fp64, and differentiates it numerically.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from table_models import CPU, VOCABULARY, make_batch

from miles.core.config import Config
from miles.core.math.logprobs import token_logprobs
from miles.core.oracle import advantages as oracle_advantages
from miles.core.oracle import distribution, policy
from miles.core.oracle.objective import OracleSample, policy_objective
from miles.core.training.objective_spec import ObjectiveSpec
from miles.core.training.ranks import SingleRank
from miles.core.training.trainer import RolloutTrainer

HIDDEN, RATE, STEP = 3, 0.5, 1e-5
GOLDEN = Path(__file__).parent / "data" / "trainer-steps.json"


class LinearModel:
    """Embedding [V, D] and output matrix [V, D], trained by plain gradient descent."""

    def __init__(self, weights):
        self.weights = torch.tensor(weights, dtype=torch.float32, requires_grad=True)

    def logits(self, tokens):
        return self.weights[0][tokens] @ self.weights[1].T

    def score(self, micro_batches, *, with_entropy=False):
        with torch.no_grad():
            return [self._scores(micro_batch, with_entropy) for micro_batch in micro_batches]

    def accumulate(self, micro_batches, output, loss):
        for number, micro_batch in enumerate(micro_batches):
            loss(number, self._scores(micro_batch, output == "entropy")).backward()

    def step(self, learning_rate):
        norm = float(self.weights.grad.norm())
        with torch.no_grad():
            self.weights -= learning_rate * self.weights.grad
        self.weights.grad = None
        return norm

    def drop_gradient(self):
        self.weights.grad = None

    def reset_optimizer(self):
        pass

    def _scores(self, micro_batch, with_entropy):
        logits = self.logits(micro_batch.tokens_P[micro_batch.rows_T])
        return token_logprobs(logits, micro_batch.targets_T, with_entropy=with_entropy)


def initial_weights(seed):
    return np.random.default_rng(seed).normal(0, 0.8, (2, VOCABULARY, HIDDEN))


def rollout():
    batch, rng = make_batch(), np.random.default_rng(5)
    masks = [mask.copy() for mask in batch.loss_masks]
    for mask in masks[::3]:
        mask[-1:] = 0.0
    return replace(batch, loss_masks=tuple(masks)).having(
        {
            name: tuple(rng.normal(mean, 0.3, r).astype(np.float32) for r in batch.response_lengths)
            for name, mean in (("rollout_log_probs", -2.5), ("teacher_log_probs", -2.0), ("values", 0.0))
        }
    )


@dataclass
class Oracle:
    """The same training in NumPy."""

    spec: ObjectiveSpec
    weights: np.ndarray
    reference: np.ndarray
    batch: object

    def scores(self, weights, i):
        """Log-probabilities and entropies of the response of sample ``i``."""
        tokens, length = self.batch.tokens[i], self.batch.response_lengths[i]
        logits = weights[0][tokens[-length - 1 : -1]] @ weights[1].T
        return distribution.token_logprobs(logits, tokens[-length:]), distribution.entropy(logits)

    def advantages(self):
        """Of every sample, from its scores before the first step."""
        spec, found = self.spec, []
        for i, reward in enumerate(self.batch.rewards):
            mask, logp = self.batch.loss_masks[i], self.scores(self.weights, i)[0]
            if spec.use_rollout_logprobs:
                logp = self.batch.rollout_log_probs[i]
            kl = np.zeros_like(logp)
            if spec.penalizes_kl_in_reward:
                kl = policy.kl(logp, self.scores(self.reference, i)[0], spec.kl_loss_type) * mask
            rewards = oracle_advantages.token_rewards(reward, kl, mask, spec.kl_coef)
            if spec.advantage_estimator == "ppo":
                values = self.batch.values[i].astype(float)
                advantage = oracle_advantages.gae(rewards, values, mask, spec.gamma, spec.lambd)[0]
            elif spec.advantage_estimator == "reinforce_plus_plus":
                advantage = oracle_advantages.discounted_returns(rewards, spec.gamma)
            elif spec.advantage_estimator == "on_policy_distillation":
                advantage = self.batch.teacher_log_probs[i] - logp
            elif spec.advantage_estimator == "reinforce_plus_plus_baseline":
                advantage = np.full(len(mask), reward) - spec.kl_coef * kl
            else:
                advantage = np.full(len(mask), reward)
            if spec.use_opd:
                advantage = advantage - spec.opd_kl_coef * (logp - self.batch.teacher_log_probs[i])
            found.append(advantage)
        return oracle_advantages.whitened(found, list(self.batch.loss_masks)) if spec.normalize_advantages else found

    def steps(self, count):
        """Loss and gradient of each of ``count`` steps; the weights follow."""
        old = [self.scores(self.weights, i)[0] for i in range(len(self.batch))]
        advantages = self.advantages() if self.spec.compute_advantages_and_returns else old
        reference = [self.scores(self.reference, i)[0] for i in range(len(self.batch))]
        size = len(self.batch) // count
        for first in range(0, len(self.batch), size):
            chosen = range(first, first + size)

            def loss(weights, chosen=chosen):
                samples = []
                for i in chosen:
                    logp, entropy = self.scores(weights, i)
                    mask, rollout = self.batch.loss_masks[i], self.batch.rollout_log_probs[i]
                    samples.append(OracleSample(mask, logp, entropy, old[i], reference[i], rollout, advantages[i]))
                per_token = self.spec.calculate_per_token_loss
                total = sum(max(float(sample.mask.sum()), 1.0) for sample in samples) if per_token else len(samples)
                if self.spec.loss_type == "sft_loss":
                    return sum(_negative_mean(sample, per_token) for sample in samples) / total
                return policy_objective(samples, self.spec)[0] / total

            gradient = numerical_gradient(loss, self.weights)
            yield loss(self.weights), gradient
            self.weights = self.weights - RATE * gradient


def _negative_mean(sample, per_token):
    """Of the log-probabilities that train, or their sum."""
    trained = float((sample.mask * sample.logp).sum())
    return -trained if per_token else -trained / max(float(sample.mask.sum()), 1.0)


def numerical_gradient(function, weights):
    gradient = np.zeros_like(weights)
    for place in np.ndindex(weights.shape):
        moved = weights.copy()
        moved[place] += STEP
        above = function(moved)
        moved[place] -= 2 * STEP
        gradient[place] = (above - function(moved)) / (2 * STEP)
    return gradient


CASES = {
    "grpo": {},
    "grpo in two steps": {"num_steps_per_rollout": 2},
    "dapo": {"eps_clip_high": 0.28, "eps_clip_c": 3.0, "calculate_per_token_loss": True, "num_steps_per_rollout": 2},
    "gspo": {"advantage_estimator": "gspo", "eps_clip": 0.01, "num_steps_per_rollout": 2},
    "kl and entropy in the loss": {
        "use_kl_loss": True,
        "kl_loss_coef": 0.3,
        "kl_loss_type": "low_var_kl",
        "use_unbiased_kl": True,
        "entropy_coef": 0.1,
    },
    "reinforce++ with kl in the reward": {
        "advantage_estimator": "reinforce_plus_plus",
        "normalize_advantages": True,
        "kl_coef": 0.2,
        "gamma": 0.9,
    },
    "reinforce++ baseline": {
        "advantage_estimator": "reinforce_plus_plus_baseline",
        "normalize_advantages": True,
        "kl_coef": 0.2,
        "kl_loss_type": "k2",
    },
    "sft": {"loss_type": "sft_loss"},
    "sft per token": {"loss_type": "sft_loss", "calculate_per_token_loss": True, "num_steps_per_rollout": 2},
    "ppo": {"advantage_estimator": "ppo", "gamma": 0.9, "lambd": 0.8, "num_steps_per_rollout": 2},
    "distillation": {"advantage_estimator": "on_policy_distillation", "num_steps_per_rollout": 2},
    "grpo and distillation": {"use_opd": True, "opd_kl_coef": 0.3},
    "tis": {"use_tis": True, "tis_clip": 1.2, "num_steps_per_rollout": 2},
    "engine's log-probs and opsm": {"use_rollout_logprobs": True, "use_opsm": True, "opsm_delta": 0.01},
}


def trained(flags):
    """Steps and weights of the trainer."""
    defaults = {"train_backend": "fsdp", "rollout_batch_size": 8, "lr": RATE, "micro_batch_size": 3}
    config = Config.of(**defaults | flags)
    model, reference = LinearModel(initial_weights(0)), LinearModel(initial_weights(1))
    trainer = RolloutTrainer(config, model, reference=reference, ranks=SingleRank(), device=CPU)
    return config, trainer.train(rollout()).steps, model.weights.detach().numpy()


@pytest.mark.parametrize("name", CASES)
def test_optimizer_steps_are_those_of_the_oracle(name):
    config, steps, weights = trained(CASES[name])
    oracle = Oracle(ObjectiveSpec.from_flags(config), initial_weights(0), initial_weights(1), rollout())
    for found, (loss, gradient) in zip(steps, oracle.steps(config.num_steps_per_rollout), strict=True):
        assert found["train/loss"] == pytest.approx(loss, rel=1e-4, abs=1e-5)
        assert found["train/grad_norm"] == pytest.approx(np.linalg.norm(gradient), rel=1e-4)
    np.testing.assert_allclose(weights, oracle.weights, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("name", CASES)
def test_optimizer_steps_are_those_on_file(name):
    _, steps, weights = trained(CASES[name])
    golden = json.loads(GOLDEN.read_text())[name]
    for found, expected in zip(steps, golden["steps"], strict=True):
        assert {key: found[key] for key in expected} == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert float(np.abs(weights).sum()) == pytest.approx(golden["sum_of_weights"], rel=1e-6)
