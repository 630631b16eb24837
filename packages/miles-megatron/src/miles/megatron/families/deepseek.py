"""DeepSeek-V3: latent attention, experts chosen by groups, first layers dense."""

from __future__ import annotations

from dataclasses import replace

from miles.core.errors import TrainingError
from miles.megatron.families.dense import HF_LAYER, LAYER, decoder, mlp_rules, outer_rules
from miles.megatron.families.experts import biased_sigmoid_constants, expert_rules, mtp_layers, mtp_rules
from miles.megatron.families.rotary import latent_rotary_constants
from miles.megatron.layouts import COLUMNS, ROWS
from miles.megatron.model_map import Architecture, HfConfig, ModelMap, Rule, WeightMap


def _architecture(hf: HfConfig) -> Architecture:
    if hf.get("attention_bias"):
        raise TrainingError("latent attention with attention_bias cannot be expressed in Megatron-Core. Use fsdp")
    if not hf.get("rope_interleave", True):
        raise TrainingError(
            "the checkpoint has rope_interleave false; latent attention of Megatron-Core turns neighboring dimensions. "
            "Use fsdp"
        )
    # Norms of Megatron-Core's latent attention take the model's epsilon, as engines do; transformers has 1e-6 there.
    constants = {
        "qk_layernorm": True,
        "q_lora_rank": hf.get("q_lora_rank"),
        "kv_lora_rank": hf["kv_lora_rank"],
        "qk_head_dim": hf["qk_nope_head_dim"],
        "qk_pos_emb_head_dim": hf["qk_rope_head_dim"],
        "v_head_dim": hf["v_head_dim"],
        **latent_rotary_constants(hf),
        **biased_sigmoid_constants(hf),
    }
    # Rotary positions are the attention's own.
    return replace(decoder(hf, **constants), rotary={}, yarn=None, latent_attention=True, mtp_layers=mtp_layers(hf))


def _weights(hf: HfConfig, padded: int) -> WeightMap:
    return WeightMap([*outer_rules(hf, padded), *_layer_rules(), *mtp_rules(hf, _layer_rules)])


def _layer_rules(ours: str = LAYER, theirs: str = HF_LAYER) -> list[Rule]:
    return [*_latent_attention_rules(ours, theirs), *mlp_rules(ours, theirs), *expert_rules(ours, theirs)]


def _latent_attention_rules(ours: str, theirs: str) -> list[Rule]:
    """Projections down to the latents, which every rank has whole, and from there up to the heads."""
    attention, hf_attention = ours + "self_attention.", theirs + "self_attn."
    return [
        Rule(ours + "input_layernorm.weight", (theirs + "input_layernorm.weight",)),
        Rule(attention + "linear_q_proj.weight", (hf_attention + "q_proj.weight",), ROWS),
        Rule(attention + "linear_q_down_proj.weight", (hf_attention + "q_a_proj.weight",)),
        Rule(attention + "linear_q_up_proj.layer_norm_weight", (hf_attention + "q_a_layernorm.weight",)),
        Rule(attention + "linear_q_up_proj.weight", (hf_attention + "q_b_proj.weight",), ROWS),
        Rule(attention + "linear_kv_down_proj.weight", (hf_attention + "kv_a_proj_with_mqa.weight",)),
        Rule(attention + "linear_kv_up_proj.layer_norm_weight", (hf_attention + "kv_a_layernorm.weight",)),
        Rule(attention + "linear_kv_up_proj.weight", (hf_attention + "kv_b_proj.weight",), ROWS),
        Rule(attention + "linear_proj.weight", (hf_attention + "o_proj.weight",), COLUMNS),
    ]


DEEPSEEK_V3 = ModelMap(_architecture, _weights)
