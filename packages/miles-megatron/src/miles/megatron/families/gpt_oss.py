"""GPT-OSS: attention sinks, every other layer with a sliding window, biases everywhere, experts with a clamped gate."""

from __future__ import annotations

from megatron.core.fusions.fused_bias_geglu import quick_gelu
from miles.core.errors import TrainingError
from miles.megatron.families.dense import HF_LAYER, LAYER, attention_rules, decoder, outer_rules, window_constants
from miles.megatron.families.experts import expert_constants, num_experts
from miles.megatron.layouts import INTERLEAVED_GATED, REPLICATED, ROWS, Layout, Transposed
from miles.megatron.model_map import Architecture, HfConfig, ModelMap, Rule, WeightMap

# Slope of the gate's sigmoid in Megatron-Core's quick GELU.
_SLOPE = 1.702


def _architecture(hf: HfConfig) -> Architecture:
    if hf.get("swiglu_alpha", _SLOPE) != _SLOPE or not hf.get("attention_bias", True):
        raise TrainingError(
            f"Megatron-Core expresses GPT-OSS with swiglu_alpha {_SLOPE} and attention_bias; the checkpoint has "
            f"swiglu_alpha {hf.get('swiglu_alpha', _SLOPE)} and attention_bias {hf.get('attention_bias', True)}"
        )
    experts = expert_constants({**hf, "moe_intermediate_size": hf["intermediate_size"]}, [1] * hf["num_hidden_layers"])
    return decoder(
        hf,
        activation_func=quick_gelu,
        activation_func_clamp_value=hf.get("swiglu_limit", 7.0),
        glu_linear_offset=1.0,
        add_bias_linear=True,
        softmax_type="learnable",
        **window_constants(hf),
        **experts,
    )


def _weights(hf: HfConfig, padded: int) -> WeightMap:
    attention, hf_attention = LAYER + "self_attention.", HF_LAYER + "self_attn."
    return WeightMap(
        [
            *outer_rules(hf, padded),
            *attention_rules(hf),
            Rule(attention + "core_attention.softmax_offset", (hf_attention + "sinks",), ROWS),
            *_expert_rules(num_experts(hf)),
        ]
    )


def _expert_rules(count: int) -> list[Rule]:
    """Experts of a layer are one tensor, with inputs before outputs."""
    mlp, hf_mlp = LAYER + "mlp.", HF_LAYER + "mlp."
    expert, hf_experts = mlp + "experts.local_experts.{expert}.", hf_mlp + "experts."

    def stacked(ours: str, theirs: str, layout: Layout) -> Rule:
        return Rule(expert + ours, (hf_experts + theirs,), layout, stacked=count)

    return [
        Rule(LAYER + "pre_mlp_layernorm.weight", (HF_LAYER + "post_attention_layernorm.weight",)),
        Rule(mlp + "router.weight", (hf_mlp + "router.weight",)),
        Rule(mlp + "router.bias", (hf_mlp + "router.bias",)),
        stacked("linear_fc1.weight", "gate_up_proj", INTERLEAVED_GATED),
        stacked("linear_fc1.bias", "gate_up_proj_bias", INTERLEAVED_GATED),
        stacked("linear_fc2.weight", "down_proj", Transposed(1)),
        stacked("linear_fc2.bias", "down_proj_bias", REPLICATED),
    ]


GPT_OSS = ModelMap(_architecture, _weights)
