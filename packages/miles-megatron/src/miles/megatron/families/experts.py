"""Mixtures of experts: the constants and the weights that families share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from miles.core.errors import TrainingError
from miles.megatron.families.dense import HF_LAYER, LAYER
from miles.megatron.layouts import COLUMNS, GATED, ROWS
from miles.megatron.model_map import HfConfig, Rule


def num_experts(hf: HfConfig) -> int:
    """Routed experts of a layer; transformers has renamed the field."""
    return int(hf.get("num_experts") or hf.get("num_local_experts") or hf["n_routed_experts"])


def expert_constants(hf: HfConfig, pattern: list[int]) -> dict[str, Any]:
    """Fields of ``TransformerConfig`` about experts; ``pattern`` is 1 for every layer that has some.

    No auxiliary loss: reinforcement learning trains with the policy's own routing unless flags ask otherwise.
    """
    return {
        "num_moe_experts": num_experts(hf),
        "moe_router_topk": hf["num_experts_per_tok"],
        "moe_ffn_hidden_size": hf["moe_intermediate_size"],
        "moe_layer_freq": pattern,
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
        "moe_token_dispatcher_type": "alltoall",
        "moe_router_dtype": "fp32",
    }


def biased_sigmoid_constants(hf: HfConfig) -> dict[str, Any]:
    """DeepSeek-V3's experts: sigmoid scores, a bias that only chooses, groups, shared experts, first layers dense.

    The bias stays as it is: to move it would change the policy behind the optimizer's back.
    """
    _check_normalization(hf)
    shared = hf.get("n_shared_experts") or 0
    return expert_constants(hf, dense_first(hf)) | {
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_router_bias_update_rate": 0.0,
        "moe_router_topk_scaling_factor": hf.get("routed_scaling_factor", 1.0),
        "moe_shared_expert_intermediate_size": shared * hf["moe_intermediate_size"] or None,
        **_group_constants(hf),
    }


def dense_first(hf: HfConfig) -> list[int]:
    """The pattern of layers of which the first are dense."""
    dense, every = hf.get("first_k_dense_replace") or 0, hf.get("moe_layer_freq") or 1
    return [int(n >= dense and n % every == 0) for n in range(hf["num_hidden_layers"])]


def _check_normalization(hf: HfConfig) -> None:
    """Megatron-Core divides sigmoid scores by their sum whenever there are several."""
    if (hf["num_experts_per_tok"] > 1) != bool(hf.get("norm_topk_prob", True)):
        raise TrainingError(
            f"the checkpoint has norm_topk_prob {hf.get('norm_topk_prob')} with {hf['num_experts_per_tok']} experts "
            "per token; Megatron-Core normalizes the scores of several experts and never that of one. Use fsdp"
        )


def _group_constants(hf: HfConfig) -> dict[str, Any]:
    """Megatron-Core scores a group by as many experts as are chosen from each; DeepSeek's models by two."""
    groups, chosen = hf.get("n_group") or 1, hf.get("topk_group") or 1
    if groups == chosen:
        return {}
    if hf["num_experts_per_tok"] // chosen != 2:
        raise TrainingError(
            f"the checkpoint chooses {hf['num_experts_per_tok']} experts from {chosen} of {groups} groups; "
            "Megatron-Core would score groups by another number of experts than two. Use fsdp"
        )
    return {"moe_router_num_groups": groups, "moe_router_group_topk": chosen}


def expert_rules(ours: str = LAYER, theirs: str = HF_LAYER) -> list[Rule]:
    """The norm before the experts, the router, the routed and the shared experts of the layers called so."""
    mlp, hf_mlp = ours + "mlp.", theirs + "mlp."
    return [
        Rule(ours + "pre_mlp_layernorm.weight", (theirs + "post_attention_layernorm.weight",)),
        Rule(mlp + "router.weight", (hf_mlp + "gate.weight",)),
        Rule(mlp + "router.expert_bias", (hf_mlp + "gate.e_score_correction_bias",), keeps_dtype=True),
        *_gated_rules(mlp + "experts.local_experts.{expert}.", hf_mlp + "experts.{expert}."),
        *_gated_rules(mlp + "shared_experts.", hf_mlp + "shared_experts."),
    ]


def _gated_rules(ours: str, theirs: str) -> list[Rule]:
    return [
        Rule(ours + "linear_fc1.weight", (theirs + "gate_proj.weight", theirs + "up_proj.weight"), GATED),
        Rule(ours + "linear_fc2.weight", (theirs + "down_proj.weight",), COLUMNS),
    ]


def mtp_layers(hf: HfConfig) -> int:
    """Layers of multi-token prediction that a checkpoint of this configuration may have."""
    return int(hf.get("num_nextn_predict_layers") or hf.get("num_mtp_layers") or 0)


def mtp_rules(hf: HfConfig, layer_rules: Callable[[str, str], list[Rule]]) -> list[Rule]:
    """Layers of multi-token prediction; in checkpoints they follow the others.  ``layer_rules`` are those of a layer.

    Embedding and head are the model's own; the copies that checkpoints may have beside each layer are not read.
    """
    rules = []
    for number in range(mtp_layers(hf)):
        ours, theirs = f"mtp.layers.{number}.", f"model.layers.{hf['num_hidden_layers'] + number}."
        rules += [
            Rule(ours + "enorm.weight", (theirs + "enorm.weight",)),
            Rule(ours + "hnorm.weight", (theirs + "hnorm.weight",)),
            Rule(ours + "eh_proj.weight", (theirs + "eh_proj.weight",), ROWS),
            *layer_rules(ours + "transformer_layer.", theirs),
            Rule(ours + "final_layernorm.weight", (theirs + "shared_head.norm.weight",)),
        ]
    return rules
