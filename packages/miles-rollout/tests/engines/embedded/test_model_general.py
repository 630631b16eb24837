"""Weights of a mixture of experts in the general layer, under the names that checkpoints and trainers give them."""

import pytest
import torch
import transformers
from safetensors.torch import load_file

from miles.rollout.engines.embedded.model import Checkpoint, load_model
from miles.rollout.engines.embedded.weights import WeightError


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("deepseek")
    torch.manual_seed(0)
    config = transformers.DeepseekV3Config(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        kv_lora_rank=16,
        q_lora_rank=24,
        qk_nope_head_dim=8,
        qk_rope_head_dim=4,
        v_head_dim=12,
        n_routed_experts=8,
        num_experts_per_tok=4,
        n_group=4,
        topk_group=2,
        first_k_dense_replace=1,
    )
    transformers.DeepseekV3ForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture
def weights(directory):
    return load_model(Checkpoint.open(str(directory)), torch.float32).weights


def test_every_tensor_has_the_name_that_the_checkpoint_gives_it(directory, weights):
    stored = load_file(directory / "model.safetensors")
    assert set(weights.names()) == set(stored)
    assert all(torch.equal(weights.read(name), tensor) for name, tensor in stored.items())


def test_one_expert_is_a_part_of_the_layers_tensor(weights):
    whole = "model.layers.1.mlp.experts.gate_up_proj"
    update = torch.randn(24, 32)
    weights.take([("model.layers.1.mlp.experts.3.up_proj.weight", update)])
    assert torch.equal(weights.read(whole)[3, 24:], update)
    weights.take([(whole, torch.ones(8, 48, 32))])
    assert torch.equal(weights.read("model.layers.1.mlp.experts.3.up_proj.weight"), torch.ones(24, 32))


def test_layers_that_predict_further_tokens_are_held_and_others_refused(weights):
    weights.take([("model.layers.2.eh_proj.weight", torch.ones(32, 64))])
    assert torch.equal(weights.read("model.layers.2.eh_proj.weight"), torch.ones(32, 64))
    with pytest.raises(WeightError, match="this model has no"):
        weights.take([("model.layers.1.eh_proj.weight", torch.ones(32, 64))])
