import dataclasses

import numpy as np
import pytest
import torch

SP = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
TRAINED = {"num_steps_per_rollout": 2, "optimizer": "sgd", "lr": 0.1}
R3 = TRAINED | {"use_rollout_routing_replay": True}
EXPERTS, TOPK, LAYERS = 4, 2, 4


def with_experts(batch, rng):
    """``batch`` with experts that no router would choose by itself."""
    routed = tuple(
        np.stack([[rng.permutation(EXPERTS)[:TOPK] for _ in range(LAYERS)] for _ in tokens[1:]]).astype(np.int32)
        for tokens in batch.tokens
    )
    return dataclasses.replace(batch, routed_experts=routed)


def trained(make, config, batch):
    actor = make(config)
    steps = actor.train(batch).steps
    return steps, {name: tensor.clone() for name, tensor in actor.named_weights()}


@pytest.fixture
def batch(rollout):
    return with_experts(rollout(), np.random.default_rng(0))


def test_the_engines_experts_change_what_the_trainer_computes(config, batch, on_ranks):
    free = on_ranks(1, lambda make: trained(make, config("qwen3 moe", **TRAINED), batch))[0]
    replayed = on_ranks(1, lambda make: trained(make, config("qwen3 moe", **R3), batch))[0]
    assert free[0][0]["train/train_rollout_logprob_abs_diff"] != replayed[0][0]["train/train_rollout_logprob_abs_diff"]


@pytest.mark.parametrize(
    "flags",
    [
        SP,
        {"pipeline_model_parallel_size": 2},
        {"context_parallel_size": 2},
        {"expert_model_parallel_size": 2},
    ],
)
@pytest.mark.slow
def test_every_layout_replays_the_same_experts(config, batch, on_ranks, flags):
    alone = on_ranks(1, lambda make: trained(make, config("qwen3 moe", **R3), batch))[0]
    divided = on_ranks(2, lambda make: trained(make, config("qwen3 moe", **R3, **flags), batch))[0]
    for step, expected in zip(divided[0], alone[0], strict=True):
        assert step == pytest.approx(expected, rel=1e-4, abs=1e-6)
    for name, tensor in divided[1].items():
        torch.testing.assert_close(tensor, alone[1][name], atol=2e-6, rtol=1e-4)


def test_recomputation_replays_them_too(config, batch, on_ranks):
    again = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    kept = on_ranks(1, lambda make: trained(make, config("qwen3 moe", **R3), batch))[0]
    recomputed = on_ranks(1, lambda make: trained(make, config("qwen3 moe", **R3, **again), batch))[0]
    assert all(torch.equal(recomputed[1][name], tensor) for name, tensor in kept[1].items())


def test_the_first_passs_experts_are_those_of_the_scores(config, rollout, on_ranks):
    """Routing of the weights before the rollout is what the first of two steps has anyway, and the second has not."""
    r2 = TRAINED | {"lr": 3.0, "use_routing_replay": True}
    free = on_ranks(1, lambda make: trained(make, config("qwen3 moe", **TRAINED | {"lr": 3.0}), rollout()))[0]
    replayed = on_ranks(1, lambda make: trained(make, config("qwen3 moe", **r2), rollout()))[0]
    assert replayed[0][0] == free[0][0]
    assert replayed[0][1] != free[0][1]


def test_a_rollout_without_recorded_experts_is_an_error(config, rollout, on_ranks):
    def run(make):
        with pytest.raises(Exception, match="2 recorded experts of every token") as caught:
            make(config("qwen3 moe", **R3)).train(rollout())
        return type(caught.value).__name__

    assert on_ranks(1, run) == ["TrainingError"]
