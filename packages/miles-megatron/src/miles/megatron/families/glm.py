"""GLM4: attention and MLP normed before and after; GLM4-MoE (GLM-4.5 and later): DeepSeek-V3's experts."""

from __future__ import annotations

from dataclasses import replace

from miles.megatron.families.dense import HF_LAYER, LAYER, attention_rules, decoder, mlp_rules, outer_rules
from miles.megatron.families.experts import biased_sigmoid_constants, expert_rules, mtp_layers, mtp_rules
from miles.megatron.families.rotary import rotary_arguments
from miles.megatron.layouts import COLUMNS, PACKED_GATED
from miles.megatron.model_map import Architecture, HfConfig, ModelMap, Rule, WeightMap

# Half of a head's dimensions turn, unless the configuration says otherwise.
_ROTARY_SHARE = 0.5


def _dense(hf: HfConfig) -> Architecture:
    plain = decoder(hf, add_qkv_bias=bool(hf.get("attention_bias", True)), rotary_interleaved=True)
    return replace(plain, rotary=rotary_arguments(hf, _ROTARY_SHARE), sandwich_norms=True)


def _dense_weights(hf: HfConfig, padded: int) -> WeightMap:
    mlp, hf_mlp = LAYER + "mlp.", HF_LAYER + "mlp."
    return WeightMap(
        [
            *outer_rules(hf, padded),
            *attention_rules(hf),
            Rule(LAYER + "post_self_attn_layernorm.weight", (HF_LAYER + "post_self_attn_layernorm.weight",)),
            Rule(mlp + "linear_fc1.layer_norm_weight", (HF_LAYER + "post_attention_layernorm.weight",)),
            Rule(mlp + "linear_fc1.weight", (hf_mlp + "gate_up_proj.weight",), PACKED_GATED),
            Rule(mlp + "linear_fc2.weight", (hf_mlp + "down_proj.weight",), COLUMNS),
            Rule(LAYER + "post_mlp_layernorm.weight", (HF_LAYER + "post_mlp_layernorm.weight",)),
        ]
    )


def _mixture(hf: HfConfig) -> Architecture:
    plain = decoder(
        hf,
        add_qkv_bias=bool(hf.get("attention_bias")),
        qk_layernorm=bool(hf.get("use_qk_norm")),
        **biased_sigmoid_constants(hf),
    )
    return replace(plain, rotary=rotary_arguments(hf, _ROTARY_SHARE), mtp_layers=mtp_layers(hf))


def _mixture_weights(hf: HfConfig, padded: int) -> WeightMap:
    def layer(ours: str = LAYER, theirs: str = HF_LAYER) -> list[Rule]:
        return [*attention_rules(hf, ours, theirs), *mlp_rules(ours, theirs), *expert_rules(ours, theirs)]

    return WeightMap([*outer_rules(hf, padded), *layer(), *mtp_rules(hf, layer)])


GLM4 = ModelMap(_dense, _dense_weights)
GLM4_MOE = ModelMap(_mixture, _mixture_weights)
