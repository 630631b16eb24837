"""Models that are tables (next token from present token alone), and rollouts to train them on."""

import math

import numpy as np
import torch

from miles.core.config import Config
from miles.core.math.logprobs import token_logprobs
from miles.core.training.critic import CriticTrainer
from miles.core.training.ranks import SingleRank
from miles.core.training.trainer import RolloutTrainer
from miles.core.types.batch import RolloutBatch

VOCABULARY = 11
CPU = torch.device("cpu")


class TableModel:
    """Counts its passes."""

    def __init__(self, seed=0):
        self.table = torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(seed)).requires_grad_()
        self.forwards = self.scorings = self.resets = self.accumulations = 0

    @torch.no_grad()
    def score(self, micro_batches, *, with_entropy=False):
        self.scorings += len(micro_batches)
        return [self._log_probs(micro_batch, with_entropy) for micro_batch in micro_batches]

    def accumulate(self, micro_batches, output, loss):
        self.forwards += len(micro_batches)
        self.accumulations += 1
        for number, micro_batch in enumerate(micro_batches):
            loss(number, self._log_probs(micro_batch, output == "entropy")).backward()

    def step(self, learning_rate):
        norm = float(self.table.grad.norm())
        if math.isfinite(norm):
            with torch.no_grad():
                self.table -= learning_rate * self.table.grad
        self.table.grad = None
        return norm

    def drop_gradient(self):
        self.table.grad = None

    def reset_optimizer(self):
        self.resets += 1

    def _log_probs(self, micro_batch, with_entropy):
        logits = self.table[micro_batch.tokens_P[micro_batch.rows_T]]
        return token_logprobs(logits, micro_batch.targets_T, with_entropy=with_entropy)


def make_batch(num_samples=8, seed=0, **changes):
    rng = np.random.default_rng(seed)
    responses = rng.integers(1, 9, num_samples).tolist()
    rewards = tuple(rng.normal(size=num_samples).tolist())
    columns = {
        "rollout_id": 3,
        "tokens": tuple(rng.integers(0, VOCABULARY, 3 + r) for r in responses),
        "response_lengths": tuple(responses),
        "loss_masks": tuple(np.ones(r, np.float32) for r in responses),
        "rewards": rewards,
        "raw_rewards": rewards,
        "truncated": (True, False) * (num_samples // 2),
        "sample_indices": tuple(range(40, 40 + num_samples)),
        "group_indices": tuple(range(num_samples)),
    }
    return RolloutBatch(**columns | changes)


def make_trainer(model=None, reference=None, old_policies=None, teacher=None, **flags):
    config = Config.of(**{"train_backend": "fsdp", "rollout_batch_size": 8, "lr": 0.1, "micro_batch_size": 3} | flags)
    return RolloutTrainer(
        config,
        model or TableModel(),
        reference=reference,
        ranks=SingleRank(),
        device=CPU,
        old_policies=old_policies,
        teacher=teacher,
    )


class TableCritic:
    def __init__(self):
        self.table = torch.zeros(VOCABULARY, requires_grad=True)
        self.rates, self.resets = [], 0

    @torch.no_grad()
    def values(self, micro_batches):
        return [self._values(micro_batch) for micro_batch in micro_batches]

    def accumulate(self, micro_batches, output, loss):
        assert output == "values"
        for number, micro_batch in enumerate(micro_batches):
            loss(number, self._values(micro_batch)).backward()

    def step(self, learning_rate):
        norm = float(self.table.grad.norm())
        self.rates.append(learning_rate)
        with torch.no_grad():
            self.table -= learning_rate * self.table.grad
        self.table.grad = None
        return norm

    def drop_gradient(self):
        self.table.grad = None

    def reset_optimizer(self):
        self.resets += 1

    def _values(self, micro_batch):
        return self.table[micro_batch.tokens_P[micro_batch.rows_T]]


def make_critic(model=None, **flags):
    defaults = {"train_backend": "fsdp", "rollout_batch_size": 8, "lr": 0.1, "micro_batch_size": 3}
    config = Config.of(**defaults | {"advantage_estimator": "ppo"} | flags)
    return CriticTrainer(config, model or TableCritic(), ranks=SingleRank(), device=CPU)
