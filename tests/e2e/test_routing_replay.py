"""Experts that the engine chose, replayed by the Megatron trainer, on a model whose routing is all ties."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from miles.core.weights.hf_directory import copy_companions

pytestmark = pytest.mark.e2e

EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True}


@pytest.fixture(scope="module")
def nearly_tied(toy, tmp_path_factory) -> Path:
    """A mixture of experts whose routers score all experts alike up to the last bits of a float."""
    folder = tmp_path_factory.mktemp("nearly tied")
    size = json.loads((toy.checkpoint / "config.json").read_text())
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim")
    same = {name: size[name] for name in (*names, "max_position_embeddings", "tie_word_embeddings", "eos_token_id")}
    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**same, **EXPERTS, num_hidden_layers=2, initializer_range=0.2))
    with torch.no_grad():
        for layer in model.model.layers:
            router = layer.mlp.gate.weight
            router.copy_(router[:1] * (1 + 1e-7 * torch.randn_like(router)))
    model.save_pretrained(folder)
    copy_companions(toy.checkpoint, folder)
    return folder


def difference(toy, miles, model: Path, run: Path, *extra: str) -> float:
    """Mean distance of the engine's log-probabilities from the trainer's, over the first rollout."""
    flags = ("--train-backend", "megatron", "--hf-checkpoint", str(model), "--num-rollout", "1")
    no_evaluation = ("--eval-interval", "1000", "--skip-eval-before-train", "--update-weight-probe-interval", "0")
    miles("train", *toy.flags(run, *flags, *no_evaluation, *extra))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").open()]
    return next(line["metrics"]["train/train_rollout_logprob_abs_diff"] for line in lines if line["kind"] == "train")


def test_replay_makes_the_difference_to_the_engine_at_least_ten_times_smaller(toy, miles, nearly_tied, tmp_path):
    free = difference(toy, miles, nearly_tied, tmp_path / "free")
    replayed = difference(toy, miles, nearly_tied, tmp_path / "replayed", "--use-rollout-routing-replay")
    assert free > 1e-3
    assert replayed < free / 10
