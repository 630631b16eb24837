"""Flags that describe the model, against what its ``config.json`` says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import MISSING, Field, fields, replace
from types import NoneType
from typing import TYPE_CHECKING, Any, get_args, get_origin

import torch.nn.functional as F

from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.transformer_config import MLATransformerConfig
from miles.core.errors import TrainingError
from miles.core.flags.training import Training
from miles.megatron.flags import TransformerFlags
from miles.megatron.model_args import ModelArgs
from miles.megatron.model_map import LATENT_FIELDS, Architecture

if TYPE_CHECKING:
    from miles.core.config import Config

# Fields of Megatron-Core's configuration that the weights of a checkpoint fix.
_FIXED = (
    "num_layers",
    "hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "ffn_hidden_size",
    "layernorm_epsilon",
    "normalization",
    "gated_linear_unit",
    "add_bias_linear",
    "add_qkv_bias",
    "qk_layernorm",
    "rotary_interleaved",
    "softmax_type",
    "window_size",
    "window_attn_skip_freq",
    "glu_linear_offset",
    "activation_func_clamp_value",
    "num_moe_experts",
    "moe_router_topk",
    "moe_ffn_hidden_size",
    "moe_shared_expert_intermediate_size",
    "moe_layer_freq",
    "moe_router_score_function",
    "moe_router_enable_expert_bias",
    "moe_router_num_groups",
    "moe_router_group_topk",
    "moe_router_topk_scaling_factor",
    *LATENT_FIELDS,
    "multi_latent_attention",
)
# A pattern may be a number: with every Nth layer, or all but every Nth.
_EVERY: dict[str, Callable[[int, int], bool]] = {
    "moe_layer_freq": lambda layer, every: layer % every == 0,
    "window_attn_skip_freq": lambda layer, every: (layer + 1) % every != 0,
}
# No heads have this size in latent attention.
_NOT_LATENT = {"kv_channels", "num_query_groups"}


def given_fields(config: Config) -> dict[str, Any]:
    """Fields of ``TransformerConfig`` that flags set."""
    args = config[ModelArgs]
    fields = _same_names(config) | args.transformer_fields()
    return (
        fields
        if args.attention_backend is None
        else fields | {"attention_backend": AttnBackend[args.attention_backend]}
    )


def _same_names(config: Config) -> dict[str, Any]:
    """Those that are flags of the same name and form."""
    values = config[TransformerFlags].model_dump().items()
    return {name: _one_or_many(name, value) for name, value in values if value is not None}


def checked(architecture: Architecture, config: Config) -> Architecture:
    """``architecture``, with the rotary positions of the flags.

    Raises TrainingError when flags say other than config.json, unless ``--allow-model-args-mismatch``.
    """
    if not config[Training].allow_model_args_mismatch and (wrong := _contradictions(architecture, config)):
        raise TrainingError(
            f"the checkpoint has another architecture than the flags say: {', '.join(wrong)}. Leave the flags out, "
            "since config.json says it all, or give --allow-model-args-mismatch"
        )
    given = _same_names(config)
    rotary = {name: given[name] for name in ("rotary_base", "rotary_percent") if name in given}
    return architecture if architecture.latent_attention else replace(architecture, rotary=architecture.rotary | rotary)


def _contradictions(architecture: Architecture, config: Config) -> list[str]:
    """Flags that say other than config.json, with both values."""
    args = config[ModelArgs]
    typed = {name: value for name, value in args.model_dump().items() if value is not None}
    parsed = {name: value for name, value in args.transformer_fields().items() if name in typed}
    known = describe(architecture)
    return [
        f"--{name.replace('_', '-')} {value} (config.json: {known[name]})"
        for name, value in (_same_names(config) | typed | parsed).items()
        if name in known and not _equal(name, value, known[name], architecture)
    ]


def describe(architecture: Architecture) -> dict[str, Any]:
    """What config.json says, under the names of the flags."""
    known = {name: architecture.transformer.get(name, default) for name, default in _DEFAULTS.items()}
    rotary, yarn = architecture.rotary, architecture.yarn or {}
    gate = known["activation_func"] if known["gated_linear_unit"] else None
    if architecture.latent_attention:
        known = {name: value for name, value in known.items() if name not in _NOT_LATENT}
    return {
        **{name: known[name] for name in _FIXED if name in known},
        "multi_latent_attention": architecture.latent_attention,
        "rotary_base": rotary.get("rotary_base", known["rotary_base"]),
        "rotary_percent": rotary.get("rotary_percent", known["rotary_percent"]),
        "rotary_scaling_factor": yarn.get("yarn_rotary_scaling_factor", known["rotary_scaling_factor"]),
        "vocab_size": architecture.vocab_size,
        "max_position_embeddings": architecture.max_positions,
        "swiglu": gate is F.silu,
        "quick_geglu": getattr(gate, "__name__", None) == "quick_gelu",
        "disable_bias_linear": not known["add_bias_linear"],
        "norm_epsilon": known["layernorm_epsilon"],
        "untie_embeddings_and_output_weights": not architecture.tied,
        "position_embedding_type": "rope" if architecture.yarn is None else "yarn",
        "use_rotary_position_embeddings": True,
        "use_rope_scaling": rotary.get("rope_scaling", False),
        "rope_scaling_factor": rotary.get("rope_scaling_factor"),
        "post_self_attn_layernorm": architecture.sandwich_norms,
        "post_mlp_layernorm": architecture.sandwich_norms,
        "num_experts": known["num_moe_experts"],
    }


def _equal(name: str, given: Any, known: Any, architecture: Architecture) -> bool:
    if name == "position_embedding_type" and given == "rope":
        return True  # YaRN's positions are rotary too
    if name in _EVERY:
        given, known = (_pattern(name, value, architecture) for value in (given, known))
    if isinstance(given, list | tuple) and isinstance(known, list | tuple):
        return list(given) == list(known)
    return bool(given == known)


def _pattern(name: str, value: Any, architecture: Architecture) -> Any:
    """One number per layer."""
    if not isinstance(value, int):
        return value
    return [int(_EVERY[name](layer, value)) for layer in range(architecture.transformer["num_layers"])]


def _one_or_many(name: str, value: Any) -> Any:
    """Flags that take one or several values come as lists; one is itself where Megatron-Core takes it so."""
    kinds = [kind for kind in get_args(TransformerFlags.model_fields[name].annotation) if kind is not NoneType]
    takes_one = any(get_origin(kind) is not list for kind in kinds)
    return value[0] if isinstance(value, list) and len(value) == 1 and takes_one else value


def _default(field: Field[Any]) -> Any:
    if field.default is not MISSING:
        return field.default
    return None if field.default_factory is MISSING else field.default_factory()


_DEFAULTS = {field.name: _default(field) for field in fields(MLATransformerConfig)}
