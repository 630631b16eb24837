"""Half precision: fp16 with a loss scale that adapts, one for dense weights and experts."""

import math

import pytest
import torch

SP = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
PP = {"pipeline_model_parallel_size": 2}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "count", "flags"),
    [("qwen3", 1, {}), ("qwen3", 2, SP), ("qwen3", 2, PP), ("qwen3 moe", 2, {"expert_model_parallel_size": 2})],
    ids=["alone", "tp sp", "pp", "ep"],
)
def test_fp16_trains_like_fp32_to_its_precision(config, rollout, on_ranks, family, count, flags):
    def run(make, dtype, flags):
        actor = make(config(family, train_dtype=dtype, lr=1e-4, **flags))
        return actor.train(rollout()).steps[0], {tensor.dtype for _, tensor in actor.named_weights()}

    ((exact, _),) = on_ranks(1, lambda make: run(make, "fp32", {}))
    step, sent = on_ranks(count, lambda make: run(make, "fp16", flags))[0]
    assert torch.float16 in sent
    assert step["train/skipped"] == 0.0
    assert step["train/loss"] == pytest.approx(exact["train/loss"], abs=5e-3)
    assert step["train/grad_norm"] == pytest.approx(exact["train/grad_norm"], rel=0.05)


def test_gradients_may_be_summed_in_the_precision_of_the_weights(config, rollout, on_ranks):
    def run(make):
        flags = {"train_dtype": "bf16", "lr": 1e-4}
        halves = (make(config(**flags, accumulate_allreduce_grads_in_fp32=whole)) for whole in (True, False))
        return [
            (role.train(rollout()).steps[0], {grads.dtype for grads in role._updater.gradients()}) for role in halves
        ]

    ((exact, fp32), (step, bf16)) = on_ranks(2, run)[0]
    assert (fp32, bf16) == ({torch.float32}, {torch.bfloat16})
    assert step["train/loss"] == exact["train/loss"]
    assert step["train/grad_norm"] == pytest.approx(exact["train/grad_norm"], rel=0.02)


def test_a_step_that_overflows_is_skipped_with_half_the_scale_which_a_checkpoint_keeps(
    config, rollout, on_ranks, tmp_path
):
    def run(make):
        actor = make(config(train_dtype="fp16", **SP))
        actor._updater.scaler._set(2.0**120, 0)
        before = {name: tensor.clone() for name, tensor in actor.named_weights()}
        step = actor.train(rollout()).steps[0]
        unchanged = all(torch.equal(tensor, before[name]) for name, tensor in actor.named_weights())
        actor.save(tmp_path)
        again = make(config(train_dtype="fp16", **SP))
        again.load(tmp_path)
        return step["train/skipped"], unchanged, math.log2(again._updater.scaler.scale)

    assert on_ranks(2, run) == [(1.0, True, 119.0)] * 2
