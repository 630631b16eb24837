import warnings

import pytest
import torch

from miles.fsdp import fused_layer
from miles.fsdp.backend import FsdpBackend

pytestmark = pytest.mark.slow

PACKED = {"use_dynamic_batch_size": True, "max_tokens_per_gpu": 64}
CASES = {
    "grpo": PACKED,
    "balanced": PACKED | {"balance_data": True},
    "static": {"micro_batch_size": 3},
    "per token": PACKED | {"calculate_per_token_loss": True},
    "two steps": PACKED | {"num_steps_per_rollout": 2},
    "whitened with kl in the reward": PACKED
    | {"advantage_estimator": "reinforce_plus_plus", "normalize_advantages": True, "kl_coef": 0.1},
    "kl in the loss": PACKED | {"use_kl_loss": True, "kl_loss_coef": 0.1, "kl_loss_type": "k3"},
    "sft": PACKED | {"loss_type": "sft_loss"},
    "recomputed": PACKED | {"gradient_checkpointing": True},
}


def trained_on(rank, flags, rollouts):
    actor = FsdpBackend().create(flags, rank)
    reports = [actor.train(batch) for batch in rollouts]
    weights = {name: tensor.clone() for name, tensor in actor.named_weights()}
    actor.close()
    return reports, weights


@pytest.mark.parametrize("case", CASES)
def test_ranks_do_not_change_the_result(config, rollout, on_ranks, case):
    flags = config(**CASES[case], optimizer="sgd", lr=0.3)
    rollouts = [rollout(rollout_id=i) for i in range(2)]
    ((alone, weights),) = on_ranks(1, lambda rank: trained_on(rank, flags, rollouts))
    (reports, sharded), (others, _) = on_ranks(2, lambda rank: trained_on(rank, flags, rollouts))
    for report, other, single in zip(reports, others, alone, strict=True):
        assert [report.steps, report.metrics.keys()] == [other.steps, other.metrics.keys()]
        for step, single_step in zip(report.steps, single.steps, strict=True):
            assert step == pytest.approx(single_step, rel=1e-4, abs=1e-6)
        for name in (name for name in report.metrics if name.startswith("rollout/")):
            assert report.metrics[name] == pytest.approx(single.metrics[name], rel=1e-5, abs=1e-6)
    assert list(sharded) == list(weights)
    for name, tensor in sharded.items():
        torch.testing.assert_close(tensor, weights[name], atol=1e-6, rtol=1e-4)


def test_replicas_of_sharded_models_train_like_one(config, rollout, on_ranks):
    flags = config(**PACKED, dp_replicate_size=2, optimizer="sgd", lr=0.3)
    ((alone, weights),) = on_ranks(
        1, lambda rank: trained_on(rank, config(**PACKED, optimizer="sgd", lr=0.3), [rollout()])
    )
    (reports, sharded), *_ = on_ranks(4, lambda rank: trained_on(rank, flags, [rollout()]))
    assert reports[0].steps[0] == pytest.approx(alone[0].steps[0], rel=1e-4, abs=1e-6)
    for name, tensor in sharded.items():
        torch.testing.assert_close(tensor, weights[name], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("flags", [{}, {"gradient_checkpointing": True}])
def test_sharded_layers_compute_in_two_steps_as_whole_ones_do(config, rollout, on_ranks, monkeypatch, flags):
    def calls(rank):
        actor = FsdpBackend().create(config(**PACKED, **flags), rank)
        seen, computed = [], fused_layer._computed
        monkeypatch.setattr(fused_layer, "_computed", lambda *given: seen.append(1) or computed(*given))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            actor.train(rollout())
        return len(seen)

    assert all(count > 0 for ranks in (1, 2) for count in on_ranks(ranks, calls))


def test_a_rank_without_samples_stays_in_step(config, rollout, on_ranks):
    flags = config(rollout_batch_size=1, n_samples_per_prompt=1, **PACKED)
    (reports, _), _ = on_ranks(2, lambda rank: trained_on(rank, flags, [rollout(num_samples=1)]))
    ((alone, _),) = on_ranks(1, lambda rank: trained_on(rank, flags, [rollout(num_samples=1)]))
    assert reports[0].steps[0] == pytest.approx(alone[0].steps[0], rel=1e-4, abs=1e-6)


def test_bfloat16_keeps_its_master_weights_in_fp32(config, rollout, on_ranks):
    def run(rank):
        actor = FsdpBackend().create(config(train_dtype="bf16", lr=1e-4, **PACKED), rank)
        report = actor.train(rollout())
        dtypes = {p.dtype for p in actor._model.module.parameters()}
        return report.steps[0], dtypes, {tensor.dtype for _, tensor in actor.named_weights()}

    ((one, master, sent),) = on_ranks(1, run)
    (two, _, _), _ = on_ranks(2, run)
    assert (master, sent) == ({torch.float32}, {torch.bfloat16})
    assert two["train/loss"] == pytest.approx(one["train/loss"], abs=2e-2)
    assert two["train/grad_norm"] == pytest.approx(one["train/grad_norm"], rel=0.1)


def test_every_rank_names_the_broken_samples(config, rollout, on_ranks):
    def run(rank):
        batch = rollout()
        batch.loss_masks[5][:] = float("nan")
        with pytest.raises(Exception, match=r"\[105\]") as caught:
            FsdpBackend().create(config(**PACKED), rank).train(batch)
        return str(caught.value)

    first, second = on_ranks(2, run)
    assert first == second
