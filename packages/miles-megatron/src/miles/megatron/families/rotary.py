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


def rotary_arguments(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of ``GPTModel``: plain rotary positions, or those that Llama 3 stretches."""
    parameters = rope_parameters(hf)
    kind = parameters["rope_type"]
    arguments = {
        "rotary_base": parameters["rope_theta"],
        "rotary_percent": parameters.get("partial_rotary_factor", hf.get("partial_rotary_factor", 1.0)),
    }
    if kind == "default":
        return arguments
    if kind == "llama3" and all(float(parameters.get(name, value)) == value for name, value in _LLAMA3.items()):
        return arguments | {"rope_scaling": True, "rope_scaling_factor": parameters["factor"]}
    if kind == "linear":
        return arguments | {"seq_len_interpolation_factor": parameters["factor"]}
    raise TrainingError(
        f"Megatron-Core has no rotary positions like the checkpoint's rope_parameters {parameters}; "
        "use --train-backend fsdp for this model"
    )
