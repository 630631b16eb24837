"""Llama, Mistral, Qwen2, Qwen2.5, Qwen3: pre-norm decoders with grouped queries and a gated MLP."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F

from miles.core.errors import TrainingError
from miles.megatron.families.rotary import rotary_arguments, yarn_attributes
from miles.megatron.layouts import COLUMNS, GATED, Qkv, Vocabulary
from miles.megatron.model_map import Architecture, HfConfig, ModelMap, Rule, WeightMap

LAYER = "decoder.layers.{layer}."
HF_LAYER = "model.layers.{layer}."


def transformer_constants(hf: HfConfig) -> dict[str, Any]:
    """Fields of ``TransformerConfig`` that all decoders of this shape share."""
    if hf.get("hidden_act", "silu") != "silu":
        raise TrainingError(f"the checkpoint's hidden_act is {hf['hidden_act']!r}; this family's model map knows silu")
    heads = hf["num_attention_heads"]
    return {
        "num_layers": hf["num_hidden_layers"],
        "hidden_size": hf["hidden_size"],
        "num_attention_heads": heads,
        "num_query_groups": hf.get("num_key_value_heads") or heads,
        "kv_channels": head_dim(hf),
        "ffn_hidden_size": hf["intermediate_size"],
        "layernorm_epsilon": hf["rms_norm_eps"],
        "normalization": "RMSNorm",
        "activation_func": F.silu,
        "gated_linear_unit": True,
        "add_bias_linear": False,
        "add_qkv_bias": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
    }


def head_dim(hf: HfConfig) -> int:
    """Size of one attention head."""
    return int(hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"])


def decoder(hf: HfConfig, **constants: Any) -> Architecture:
    """An architecture of these constants."""
    return Architecture(
        transformer=transformer_constants(hf) | constants,
        vocab_size=hf["vocab_size"],
        max_positions=hf["max_position_embeddings"],
        tied=bool(hf.get("tie_word_embeddings", False)),
        rotary=rotary_arguments(hf),
        yarn=yarn_attributes(hf),
    )


def window_constants(hf: HfConfig) -> dict[str, Any]:
    """A sliding window over all layers, or over those from ``max_window_layers`` on."""
    if not hf.get("sliding_window") or not hf.get("use_sliding_window", True):
        return {}
    kinds = hf.get("layer_types") or ["sliding_attention"] * hf["num_hidden_layers"]
    if "sliding_attention" not in kinds:
        return {}
    return {
        "window_size": (hf["sliding_window"] - 1, 0),
        "window_attn_skip_freq": [int(kind == "sliding_attention") for kind in kinds],
    }


def outer_rules(hf: HfConfig, padded: int) -> list[Rule]:
    """Embedding, last norm, output head."""
    vocabulary = Vocabulary(size=hf["vocab_size"], padded=padded)
    # The last stage of a pipeline has a copy of a tied embedding.
    head = "model.embed_tokens.weight" if hf.get("tie_word_embeddings") else "lm_head.weight"
    return [
        Rule("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), vocabulary),
        Rule("decoder.final_layernorm.weight", ("model.norm.weight",)),
        Rule("output_layer.weight", (head,), vocabulary),
    ]


def attention_rules(hf: HfConfig, ours: str = LAYER, theirs: str = HF_LAYER) -> list[Rule]:
    """Attention with grouped queries, its norms and its biases, of the layers called so."""
    heads = hf["num_attention_heads"]
    qkv = Qkv(heads=heads, groups=hf.get("num_key_value_heads") or heads, head_dim=head_dim(hf))
    attention, hf_attention = ours + "self_attention.", theirs + "self_attn."
    projections = tuple(f"{hf_attention}{name}_proj." for name in "qkv")
    return [
        Rule(attention + "linear_qkv.layer_norm_weight", (theirs + "input_layernorm.weight",)),
        Rule(attention + "linear_qkv.weight", tuple(name + "weight" for name in projections), qkv),
        Rule(attention + "linear_qkv.bias", tuple(name + "bias" for name in projections), qkv),
        Rule(attention + "q_layernorm.weight", (hf_attention + "q_norm.weight",)),
        Rule(attention + "k_layernorm.weight", (hf_attention + "k_norm.weight",)),
        Rule(attention + "linear_proj.weight", (hf_attention + "o_proj.weight",), COLUMNS),
        Rule(attention + "linear_proj.bias", (hf_attention + "o_proj.bias",)),
    ]


def mlp_rules(ours: str = LAYER, theirs: str = HF_LAYER) -> list[Rule]:
    """The gated MLP and its norm, of the layers called so."""
    mlp, hf_mlp = ours + "mlp.", theirs + "mlp."
    return [
        Rule(mlp + "linear_fc1.layer_norm_weight", (theirs + "post_attention_layernorm.weight",)),
        Rule(mlp + "linear_fc1.weight", (hf_mlp + "gate_proj.weight", hf_mlp + "up_proj.weight"), GATED),
        Rule(mlp + "linear_fc2.weight", (hf_mlp + "down_proj.weight",), COLUMNS),
    ]


def decoder_weights(hf: HfConfig, padded: int) -> WeightMap:
    """The weights of a dense decoder."""
    return WeightMap([*outer_rules(hf, padded), *attention_rules(hf), *mlp_rules()])


def _llama(hf: HfConfig) -> Architecture:
    if hf.get("attention_bias") or hf.get("mlp_bias"):
        raise TrainingError("Llama with attention_bias or mlp_bias cannot be expressed in Megatron-Core by this map")
    return decoder(hf, **window_constants(hf))


def _qwen2(hf: HfConfig) -> Architecture:
    windows = window_constants(hf) if hf.get("use_sliding_window") else {}
    return decoder(hf, add_qkv_bias=True, **windows)


def _qwen3(hf: HfConfig) -> Architecture:
    windows = window_constants(hf) if hf.get("use_sliding_window") else {}
    return decoder(hf, qk_layernorm=True, add_qkv_bias=bool(hf.get("attention_bias")), **windows)


LLAMA = ModelMap(_llama, decoder_weights)
QWEN2 = ModelMap(_qwen2, decoder_weights)
QWEN3 = ModelMap(_qwen3, decoder_weights)
