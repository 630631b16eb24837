"""The trainer on an accelerator against the CPU: attention of variable lengths, half precision, NCCL, offloading."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.distributed as dist
from transformers import Qwen3Config, Qwen3ForCausalLM

from miles.core.config import Config
from miles.core.math.logprobs import linear_logprobs
from miles.core.protocols.backend import Rank
from miles.core.types.batch import RolloutBatch
from miles.fsdp.backend import FsdpBackend

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator"),
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        tie_word_embeddings=True,
    )
    Qwen3ForCausalLM(config).save_pretrained(directory)
    return str(directory)


def rollout() -> RolloutBatch:
    rng = np.random.default_rng(0)
    responses = rng.integers(1, 60, 8).tolist()
    prompts = [rng.integers(0, 512, 9) for _ in range(4)]
    rewards = tuple(rng.normal(size=8).tolist())
    return RolloutBatch(
        rollout_id=0,
        tokens=tuple(np.concatenate([prompts[i // 2], rng.integers(0, 512, r)]) for i, r in enumerate(responses)),
        response_lengths=tuple(responses),
        loss_masks=tuple(np.ones(r, np.float32) for r in responses),
        rewards=rewards,
        raw_rewards=rewards,
        truncated=(False,) * 8,
        sample_indices=tuple(range(8)),
        group_indices=tuple(i // 2 for i in range(8)),
    )


def first_step(checkpoint: str, **flags: object) -> dict[str, float]:
    """One optimizer step, whose metrics are returned."""
    common = {
        "train_backend": "fsdp",
        "hf_checkpoint": checkpoint,
        "rollout_batch_size": 4,
        "n_samples_per_prompt": 2,
        "num_rollout": 1,
        "use_dynamic_batch_size": True,
        "max_tokens_per_gpu": 200,
        "rollout_temperature": 1.0,
        "rollout_max_prompt_len": None,
        "rollout_max_response_len": None,
        "use_dynamic_global_batch_size": False,
    }
    actor = FsdpBackend().create(Config.of(**common | flags), Rank())
    try:
        return actor.train(rollout()).steps[0]
    finally:
        actor.close()
        if dist.is_initialized():
            dist.destroy_process_group()


@pytest.fixture(scope="module")
def expected(checkpoint: str) -> dict[str, float]:
    return first_step(checkpoint, device="cpu", train_dtype="fp32", attn_implementation="sdpa")


def test_fp32_equals_the_cpu(checkpoint: str, expected: dict[str, float]) -> None:
    step = first_step(checkpoint, device="cuda", train_dtype="fp32", attn_implementation="sdpa")
    assert step["train/grad_norm"] == pytest.approx(expected["train/grad_norm"], rel=1e-2)


@pytest.mark.parametrize("attention", ["flash_attention_2", "sdpa", "eager"])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_half_precision_is_near_the_cpu(
    checkpoint: str, expected: dict[str, float], attention: str, dtype: str
) -> None:
    step = first_step(checkpoint, device="cuda", train_dtype=dtype, attn_implementation=attention)
    assert step["train/loss"] == pytest.approx(expected["train/loss"], abs=3e-2)
    assert step["train/grad_norm"] == pytest.approx(expected["train/grad_norm"], rel=0.15)


def test_weights_in_host_memory_train_alike(checkpoint: str) -> None:
    flags = {"device": "cuda", "train_dtype": "bf16"}
    kept, moved = (first_step(checkpoint, **flags, fsdp_cpu_offload=offload) for offload in (False, True))
    assert moved["train/grad_norm"] == pytest.approx(kept["train/grad_norm"], rel=1e-2)


def test_log_probabilities_take_less_memory_than_the_logits() -> None:
    hidden = torch.randn(4096, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(151_936, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    target = torch.randint(151_936, (4096,), device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    linear_logprobs(hidden, weight, target).logp_T.sum().backward()
    logits = 4096 * 151_936 * 4
    assert torch.cuda.max_memory_allocated() - before < 0.9 * logits
