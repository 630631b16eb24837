"""Decoder layers in two steps: the numbers of the layers as they are written out, and only where they are these."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

from miles.core.training.segments import Segments
from miles.fsdp.attention import kernel_name
from miles.fsdp.fused_layer import fuse_layers
from miles.fsdp.loading import decoder_layers, recompute_layers

SHAPE = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "vocab_size": 40,
    "head_dim": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
SHARED_PROMPT = Segments([6, 5, 7], torch.device("cpu"), np.asarray([0, 1, 2, 3, 4, 5, 0, 1, 2, 6, 7, *range(8, 15)]))
HALF_OF_EACH_HEAD = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
MODELS = {"qwen3": (Qwen3ForCausalLM, Qwen3Config), "llama": (LlamaForCausalLM, LlamaConfig)}


def model_of(model_class, config_class, **settings) -> nn.Module:
    torch.manual_seed(0)
    config = config_class(**SHAPE | settings)
    config._attn_implementation = kernel_name("sdpa")
    model = model_class(config)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            nn.init.uniform_(parameter, 0.5, 1.5)
    return model.train()


def results(model: nn.Module, segments: Segments) -> list[torch.Tensor]:
    """Hidden states and the gradients of all parameters."""
    model.zero_grad()
    ids = (torch.arange(segments.num_rows) * 7 % SHAPE["vocab_size"])[None]
    positions = torch.arange(segments.num_rows)[None] % 9
    hidden = model.model(ids, position_ids=positions, use_cache=False, segments=segments).last_hidden_state
    (hidden * torch.linspace(-1, 2, hidden.numel()).view_as(hidden)).sum().backward()
    body = model.model.parameters()
    return [hidden.detach(), *(parameter.grad.clone() for parameter in body)]


def used(model: nn.Module) -> bool:
    """Whether the layers compute in two steps."""
    hidden = torch.randn(1, SHARED_PROMPT.num_rows, SHAPE["hidden_size"], requires_grad=True)
    rotation = model.model.rotary_emb(hidden, torch.arange(SHARED_PROMPT.num_rows)[None])
    out = model.model.layers[0](hidden, attention_mask=None, position_embeddings=rotation, segments=SHARED_PROMPT)
    return "_GatedMlp" in type(out.grad_fn).__name__


@pytest.mark.parametrize("name", MODELS)
def test_hidden_states_and_gradients_are_those_of_the_model(name):
    model = model_of(*MODELS[name])
    written_out = results(model, SHARED_PROMPT)
    assert fuse_layers(decoder_layers(model)) == 2
    assert used(model)
    for mine, expected in zip(results(model, SHARED_PROMPT), written_out, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-5)


def test_long_samples_are_left_to_the_layer():
    model = model_of(*MODELS["qwen3"])
    long = Segments([200, 9], torch.device("cpu"))
    written_out = results(model, long)
    fuse_layers(decoder_layers(model))
    assert all(map(torch.equal, results(model, long), written_out))


def test_what_changes_a_layer_afterwards_takes_effect():
    model = model_of(*MODELS["qwen3"])
    fuse_layers(decoder_layers(model))

    class Adapted(nn.Linear):
        pass

    model.model.layers[0].self_attn.q_proj = Adapted(16, 16, bias=False)
    assert not used(model)


def test_layers_that_are_computed_again_give_the_same_to_the_bit():
    model = model_of(*MODELS["qwen3"])
    fuse_layers(decoder_layers(model))
    kept = results(model, SHARED_PROMPT)
    recompute_layers(model)
    assert all(map(torch.equal, results(model, SHARED_PROMPT), kept))


def test_long_samples_are_computed_again_too_in_layers_that_fsdp_has_made_its_own():
    """It gives a layer a class of its own when it shards it, which is after layers were fused."""
    model = model_of(*MODELS["qwen3"])
    fuse_layers(decoder_layers(model))
    recompute_layers(model)
    computed_again = []
    for layer in list(decoder_layers(model)):
        layer.__class__ = type(f"FSDP{type(layer).__name__}", (type(layer),), {})
        checkpoint = layer._gradient_checkpointing_func
        layer._gradient_checkpointing_func = lambda *given, of=checkpoint: computed_again.append(1) or of(*given)
    results(model, Segments([200, 9], torch.device("cpu")))
    assert computed_again == [1, 1]


def test_whoever_watches_a_part_sees_it_called():
    model = model_of(*MODELS["qwen3"])
    fuse_layers(decoder_layers(model))
    seen = []
    hook = model.model.layers[0].mlp.down_proj.register_forward_hook(lambda *_: seen.append(1))
    assert not used(model)
    assert seen
    hook.remove()
    assert used(model)


def test_of_layers_that_differ_only_those_that_agree_compute_in_two_steps():
    model = model_of(SmolLM3ForCausalLM, SmolLM3Config, no_rope_layers=[1, 0], pad_token_id=0)
    written_out = results(model, SHARED_PROMPT)
    assert fuse_layers(decoder_layers(model)) == 1
    for mine, expected in zip(results(model, SHARED_PROMPT), written_out, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-5)


def test_positions_that_turn_a_part_of_each_head_are_left_to_the_layer():
    dense = {"first_k_dense_replace": 2, "attention_bias": False}
    model = model_of(Glm4MoeForCausalLM, Glm4MoeConfig, **dense, rope_parameters=HALF_OF_EACH_HEAD)
    written_out = results(model, SHARED_PROMPT)
    fuse_layers(decoder_layers(model))
    assert all(map(torch.equal, results(model, SHARED_PROMPT), written_out))


@pytest.mark.parametrize(
    ("model_class", "config_class", "settings"),
    [
        (MistralForCausalLM, MistralConfig, {"sliding_window": 8}),  # which its attention takes from there
        (Qwen2ForCausalLM, Qwen2Config, {}),  # biases
        (Olmo2ForCausalLM, Olmo2Config, {}),  # norms elsewhere
        (Gemma2ForCausalLM, Gemma2Config, {}),
        (GptOssForCausalLM, GptOssConfig, {"num_local_experts": 2, "num_experts_per_tok": 1}),
        (LlamaForCausalLM, LlamaConfig, {"hidden_act": "gelu"}),
        (Qwen3ForCausalLM, Qwen3Config, {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0}),
    ],
)
def test_other_layers_stay_as_they_are(model_class, config_class, settings):
    assert fuse_layers(decoder_layers(model_of(model_class, config_class, **settings))) == 0


@pytest.mark.parametrize(("attention", "count"), [(kernel_name("sdpa"), 2), ("sdpa", 0)])
def test_a_model_without_weights_is_fused_where_one_with_weights_is(attention, count):
    """Ranks whose weights are still to come decide as rank 0 does; attention of transformers' own packs nothing."""
    config = Qwen3Config(**SHAPE)
    config._attn_implementation = attention
    with torch.device("meta"):
        still_to_come = Qwen3ForCausalLM(config)
    for model in (still_to_come, Qwen3ForCausalLM(config)):
        assert fuse_layers(decoder_layers(model)) == count
