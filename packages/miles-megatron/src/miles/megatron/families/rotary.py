"""Rotary positions of a Hugging Face configuration, of any age."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from miles.core.errors import TrainingError

# The only scaling of Llama 3 that Megatron-Core computes.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def rope_parameters(hf: Mapping[str, Any]) -> dict[str, Any]:
    """``rope_theta``, ``rope_type`` and their companions, from ``rope_parameters`` or from the fields it replaced."""
    parameters = dict(hf.get("rope_parameters") or hf.get("rope_scaling") or {})
    parameters.setdefault("rope_theta", hf.get("rope_theta", 10000.0))
    parameters.setdefault("rope_type", parameters.pop("type", "default"))
    return parameters


def rotary_arguments(hf: Mapping[str, Any], share: float = 1.0) -> dict[str, Any]:
    """Arguments of ``GPTModel``: plain rotary positions, or those that Llama 3 stretches, or YaRN's (but its range).

    ``share`` of a head's dimensions turn where the configuration does not say.
    """
    parameters = rope_parameters(hf)
    kind = parameters["rope_type"]
    arguments = {
        "rotary_base": parameters["rope_theta"],
        "rotary_percent": parameters.get("partial_rotary_factor", hf.get("partial_rotary_factor", share)),
    }
    if kind == "default":
        return arguments
    if kind == "llama3" and all(float(parameters.get(name, value)) == value for name, value in _LLAMA3.items()):
        return arguments | {"rope_scaling": True, "rope_scaling_factor": parameters["factor"]}
    if kind == "linear":
        return arguments | {"seq_len_interpolation_factor": parameters["factor"]}
    if kind == "yarn" and arguments["rotary_percent"] == 1.0:
        return arguments
    raise _unknown(parameters)


def yarn_attributes(hf: Mapping[str, Any]) -> dict[str, Any] | None:
    """What Megatron-Core reads as ``yarn_...`` of its configuration; None without YaRN (arXiv:2309.00071)."""
    parameters = rope_parameters(hf)
    if parameters["rope_type"] != "yarn":
        return None
    return {
        "yarn_rotary_scaling_factor": parameters["factor"],
        "yarn_mscale": parameters.get("mscale"),
        "yarn_mscale_all_dim": parameters.get("mscale_all_dim"),
        "yarn_correction_range_round_to_int": parameters.get("truncate", True),
        **{f"yarn_{name}": value for name, value in _yarn_range(hf, parameters).items()},
    }


def latent_rotary_constants(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of ``MLATransformerConfig``: plain rotary positions, or YaRN's."""
    parameters = rope_parameters(hf)
    kind = parameters["rope_type"]
    plain = {"rope_type": "rope", "rotary_base": parameters["rope_theta"], "rotary_percent": 1.0}
    if kind == "default":
        return plain | {"rotary_scaling_factor": 1.0, "mscale": 1.0, "mscale_all_dim": 0.0}
    scales = parameters.get("mscale") or 0.0, parameters.get("mscale_all_dim") or 0.0
    if kind != "yarn" or not parameters.get("truncate", True) or (scales[0] == 0.0) != (scales[1] == 0.0):
        raise _unknown(parameters)
    stretched = {"rope_type": "yarn", "rotary_scaling_factor": parameters["factor"], **_yarn_range(hf, parameters)}
    return plain | stretched | {"mscale": scales[0] or 1.0, "mscale_all_dim": scales[1]}


def _yarn_range(hf: Mapping[str, Any], parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Which frequencies YaRN stretches."""
    if parameters.get("attention_factor") is not None:
        raise _unknown(parameters)
    return {
        "original_max_position_embeddings": parameters.get("original_max_position_embeddings")
        or hf["max_position_embeddings"],
        "beta_fast": parameters.get("beta_fast") or 32.0,
        "beta_slow": parameters.get("beta_slow") or 1.0,
    }


def _unknown(parameters: Mapping[str, Any]) -> TrainingError:
    return TrainingError(
        f"Megatron-Core has no rotary positions like the checkpoint's rope_parameters {dict(parameters)}; "
        "use --train-backend fsdp for this model"
    )
