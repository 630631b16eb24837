import math
import os

import pytest
import torch

from miles.core.protocols.backend import Rank
from miles.core.training.loss_scaling import LossScaler
from miles.fsdp.backend import FsdpBackend

pytestmark = pytest.mark.slow

PACKED = {"use_dynamic_batch_size": True, "max_tokens_per_gpu": 64}


def test_the_scale_halves_on_overflow_and_doubles_after_a_thousand_steps():
    scaler = LossScaler()
    first = scaler.scale
    scaler.overflowed()
    assert scaler.scale == first / 2
    for _ in range(999):
        scaler.stepped()
    assert scaler.scale == first / 2
    scaler.stepped()
    assert scaler.scale == first


def test_fp16_trains_like_fp32_to_its_precision(config, rollout, on_ranks):
    def run(rank, dtype):
        actor = FsdpBackend().create(config(train_dtype=dtype, lr=1e-4, **PACKED), rank)
        report = actor.train(rollout())
        dtypes = {p.dtype for p in actor._model.module.parameters()}
        return report.steps[0], dtypes, {tensor.dtype for _, tensor in actor.named_weights()}

    ((exact, _, _),) = on_ranks(1, lambda rank: run(rank, "fp32"))
    for count in (1, 2):
        step, master, sent = on_ranks(count, lambda rank: run(rank, "fp16"))[0]
        assert (master, sent) == ({torch.float32}, {torch.float16})
        assert step["train/loss"] == pytest.approx(exact["train/loss"], abs=5e-3)
        assert step["train/grad_norm"] == pytest.approx(exact["train/grad_norm"], rel=0.05)


def test_a_step_that_overflows_is_skipped_with_half_the_scale(config, rollout, on_ranks):
    def run(rank):
        actor = FsdpBackend().create(config(train_dtype="fp16", **PACKED), rank)
        actor._gradients.scaler._set(2.0**120, 0)
        before = {name: tensor.clone() for name, tensor in actor.named_weights()}
        step = actor.train(rollout()).steps[0]
        unchanged = all(torch.equal(tensor, before[name]) for name, tensor in actor.named_weights())
        return step, unchanged, math.log2(actor._gradients.scaler.scale)

    for step, unchanged, exponent in on_ranks(2, run):
        assert step["train/skipped"] == 1.0
        assert (unchanged, exponent) == (True, 119)


def test_the_scale_is_part_of_a_checkpoint(config, on_ranks, tmp_path):
    def run(rank):
        flags = config(train_dtype="fp16", **PACKED)
        actor = FsdpBackend().create(flags, rank)
        actor._gradients.scaler._set(8.0, 3)
        actor.save(tmp_path)
        actor.close()
        again = FsdpBackend().create(flags, rank)
        again.load(tmp_path)
        return {name: float(tensor) for name, tensor in again._gradients.scaler.state.items()}

    assert on_ranks(1, run) == [{"scale": 8.0, "good_steps": 3.0}]


def test_weights_in_host_memory_train_alike(config, rollout, on_ranks):
    def run(rank, **flags):
        actor = FsdpBackend().create(config(**PACKED, **flags), rank)
        steps = [actor.train(rollout(rollout_id=i)).steps[0] for i in range(2)]
        return steps, {name: tensor.clone() for name, tensor in actor.named_weights()}

    kept, weights = on_ranks(2, run)[0]
    offloaded, moved = on_ranks(2, lambda rank: run(rank, fsdp_cpu_offload=True, fsdp_state_dict_cpu_offload=True))[0]
    assert offloaded == kept
    assert all(torch.equal(moved[name], weights[name]) for name in weights)


def test_deterministic_mode_prepares_products_on_an_accelerator(config, monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    try:
        FsdpBackend().create(config(deterministic_mode=True), Rank()).close()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    finally:
        torch.use_deterministic_algorithms(False)
