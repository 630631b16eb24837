"""Packed rows, filled rows and a row for every sample: other shapes, the same training."""

import pytest
import torch

from miles.core.protocols.backend import Rank
from miles.fsdp.backend import FsdpBackend

TWO_STEPS = {"micro_batch_size": 3, "num_steps_per_rollout": 2, "optimizer": "sgd", "lr": 0.3}


def trained(actor, flags, rollouts):
    """Shapes of the model's input, steps, and weights."""
    made, shapes = actor(**flags), []
    body = made._model.module.lm.base_model
    body.register_forward_pre_hook(lambda _, args, given: shapes.append(given["input_ids"].shape), with_kwargs=True)
    steps = [step for batch in rollouts for step in made.train(batch).steps]
    return shapes, steps, {name: tensor.clone() for name, tensor in made.named_weights()}


def assert_same(found, expected):
    for step, expected_step in zip(found[1], expected[1], strict=True):
        assert step == pytest.approx(expected_step, rel=2e-4, abs=2e-6)
    for name, tensor in found[2].items():
        torch.testing.assert_close(tensor, expected[2][name], atol=2e-6, rtol=2e-4)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_filled_rows_train_alike(actor, rollout, attention):
    rollouts = [rollout(rollout_id=i) for i in range(2)]
    flags = TWO_STEPS | {"attn_implementation": attention}
    plain, filled = (trained(actor, flags | {"data_pad_size_multiplier": size}, rollouts) for size in (1, 64))
    assert any(length % 64 for _, length in plain[0])
    assert not any(length % 64 for _, length in filled[0])
    assert_same(filled, plain)


def test_rows_of_single_samples_train_alike(actor, rollout):
    rollouts = [rollout(rollout_id=i) for i in range(2)]
    packed = trained(actor, TWO_STEPS, rollouts)
    padded = trained(actor, TWO_STEPS | {"qkv_format": "bshd", "data_pad_size_multiplier": 8}, rollouts)
    assert all(rows == 1 for rows, _ in packed[0])
    assert {rows for rows, _ in padded[0]} == {3, 1}
    assert not any(length % 8 for _, length in padded[0])
    assert_same(padded, packed)


def test_a_critic_values_rows_of_single_samples_alike(config, rollout):
    critics = [
        FsdpBackend().create(config(advantage_estimator="ppo", **TWO_STEPS, qkv_format=layout), Rank(), "critic")
        for layout in ("thd", "bshd")
    ]
    packed, padded = (critic.score(rollout())["values"] for critic in critics)
    for one, other in zip(packed, padded, strict=True):
        torch.testing.assert_close(torch.tensor(one), torch.tensor(other), atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_ranks_that_share_samples_fill_their_rows(config, rollout, on_ranks):
    def run(rank, multiple):
        actor = FsdpBackend().create(
            config(**TWO_STEPS, context_parallel_size=rank.world_size, data_pad_size_multiplier=multiple), rank
        )
        shapes = []
        actor._model.module.lm.base_model.register_forward_pre_hook(
            lambda _, args, given: shapes.append(given["input_ids"].shape[1]), with_kwargs=True
        )
        return shapes, actor.train(rollout()).steps

    ((_, alone),) = on_ranks(1, lambda rank: run(rank, 1))
    for shapes, steps in on_ranks(2, lambda rank: run(rank, 16)):
        assert not any(length % 16 for length in shapes)
        for step, expected in zip(steps, alone, strict=True):
            assert step == pytest.approx(expected, rel=2e-4, abs=2e-6)
