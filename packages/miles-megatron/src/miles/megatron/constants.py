"""From a checkpoint's ``config.json`` and the flags to Megatron-Core's configuration."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from megatron.core.models.gpt.gpt_layer_specs import HAVE_TE
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
from miles.core.errors import TrainingError
from miles.core.flags.algorithm import Algorithm
from miles.core.flags.system import System
from miles.core.flags.training import Training
from miles.core.protocols.backend import Role
from miles.core.registry import Registry
from miles.megatron.architecture_flags import given_fields
from miles.megatron.flags import Megatron, Mtp, Parallelism
from miles.megatron.model_map import Architecture, HfConfig, ModelMap
from miles.megatron.site import Site

if TYPE_CHECKING:
    from miles.core.config import Config

_LOG = logging.getLogger(__name__)


def read_hf_config(directory: Path) -> HfConfig:
    """The text of ``config.json``."""
    path = directory / "config.json"
    try:
        config: HfConfig = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TrainingError(f"{path} cannot be read: {error}") from error
    return config


def write_hf_config(source: Path, directory: Path, dtype: torch.dtype) -> None:
    """Write the configuration of ``source``, with the dtype of the weights beside it."""
    text = dict(read_hf_config(source))
    text.pop("torch_dtype", None)
    text["dtype"] = str(dtype).removeprefix("torch.")
    quantization = text.pop("quantization_config", None)
    if quantization is not None:
        method = quantization.get("quant_method")
        _LOG.warning("%s is quantized (%s); the weights in %s are in %s", source, method, directory, text["dtype"])
    (directory / "config.json").write_text(json.dumps(text, indent=2) + "\n", encoding="utf-8")
    generation = source / "generation_config.json"
    if generation.is_file() and source.resolve() != directory.resolve():
        shutil.copyfile(generation, directory / generation.name)


def model_map(hf: HfConfig, name: str | None = None) -> ModelMap:
    """The family of a checkpoint, or the map called ``name``.  Raises TrainingError for one that no map knows."""
    registry = Registry("miles.model_maps")
    name = name or hf["model_type"]
    if "." not in name and name not in registry:
        raise TrainingError(
            f"the megatron backend knows no model of model_type {name!r} "
            f"(it knows {', '.join(registry.names())}); use --train-backend fsdp, or install a package with a "
            "miles.model_maps entry point"
        )
    family: ModelMap = registry.get(name)
    return family


def padded_vocabulary(size: int, multiple: int, ranks: int) -> int:
    """Rows of the vocabulary with padding: a multiple for every rank, and a token on every rank."""
    rows = -(-size // (multiple * ranks)) * multiple
    if rows * (ranks - 1) >= size:
        rows = -(-size // ranks)
    return rows * ranks


def transformer_config(
    config: Config, site: Site, architecture: Architecture, role: Role = "actor"
) -> TransformerConfig:
    """The architecture's constants, what the run decides, then the flags that were given."""
    parallel, training = config[Parallelism], config[Training]
    pipelined = parallel.pipeline_model_parallel_size > 1
    decided: dict[str, Any] = {
        "tensor_model_parallel_size": parallel.tensor_model_parallel_size,
        "sequence_parallel": parallel.sequence_parallel and parallel.tensor_model_parallel_size > 1,
        "pipeline_model_parallel_size": parallel.pipeline_model_parallel_size,
        "virtual_pipeline_model_parallel_size": parallel.virtual_pipeline_model_parallel_size,
        "context_parallel_size": training.context_parallel_size,
        "expert_model_parallel_size": parallel.expert_model_parallel_size,
        "expert_tensor_parallel_size": parallel.expert_tensor_parallel_size,
        "mtp_num_layers": _mtp_layers(config, architecture) if role == "actor" else None,
        "moe_enable_routing_replay": config[Algorithm].use_routing_replay,
        "deterministic_mode": training.deterministic_mode,
        "params_dtype": site.dtype,
        "pipeline_dtype": site.dtype if pipelined else None,
        "bf16": site.dtype == torch.bfloat16,
        "fp16": site.dtype == torch.float16,
        # Packs differ in length, and stages have to tell each other.
        "variable_seq_lengths": pipelined,
        "moe_token_dispatcher_type": "alltoall",
        # Losses come divided by what the whole step counts, so that gradients are summed and never averaged.
        "calculate_per_token_loss": True,
        "use_cpu_initialization": site.device.type == "cpu",
        # Every weight comes from the checkpoint.
        "perform_initialization": False,
        "gradient_accumulation_fusion": False,
        # The default has an older spelling, of which every construction warns.
        "cuda_graph_scope": [],
    }
    if parallel.virtual_pipeline_model_parallel_size is not None:
        # Without these, the interleaved schedule computes wrong gradients on two stages.
        decided |= {"overlap_p2p_comm": True, "batch_p2p_comm": False}
    kind = MLATransformerConfig if architecture.latent_attention else TransformerConfig
    known = {field.name for field in fields(kind)}
    values = decided | architecture.transformer | given_fields(config)
    _check_layout(architecture, values)
    _check_kernels(values, site)
    made = kind(**{name: value for name, value in values.items() if name in known})
    for name, value in (architecture.yarn or {}).items():
        setattr(made, name, value)
    return made


def _mtp_layers(config: Config, architecture: Architecture) -> int | None:
    """Layers of multi-token prediction to build."""
    count = config[Mtp].mtp_num_layers
    if count is not None and count != architecture.mtp_layers:
        raise TrainingError(
            f"--mtp-num-layers {count}: the checkpoint has {architecture.mtp_layers} layers of multi-token prediction "
            "that its model map knows (num_nextn_predict_layers of config.json)"
        )
    return count


def _check_layout(architecture: Architecture, values: Mapping[str, Any]) -> None:
    """What Megatron-Core would compute wrong, or refuse without saying what to do."""
    tensor = values["tensor_model_parallel_size"]
    if architecture.latent_attention and tensor > 1 and not values["sequence_parallel"]:
        raise TrainingError(
            "latent attention with --tensor-model-parallel-size needs --sequence-parallel: without it, Megatron-Core "
            "would drop a part of the gradient of the keys' positions"
        )
    experts = values["expert_tensor_parallel_size"] or tensor
    if values.get("num_moe_experts") and values.get("add_bias_linear") and experts > 1:
        raise TrainingError(
            "experts with biases cannot be divided among tensor-parallel ranks: give --expert-tensor-parallel-size 1"
        )


# Kernels of Transformer Engine that compute what plain operations do.
_FUSIONS = ("moe_permute_fusion", "moe_router_fusion", "apply_rope_fusion")


def _check_kernels(values: dict[str, Any], site: Site) -> None:
    """Precisions that only Transformer Engine has; and without it, do without its kernels where others do the same."""
    for name in ("fp8", "fp4"):
        if values.get(name) and not (HAVE_TE and site.device.type == "cuda"):
            raise TrainingError(
                f"--{name} {values[name]} needs Transformer Engine and a GPU; this rank computes on the "
                f"{site.device.type} {'with' if HAVE_TE else 'without'} Transformer Engine. Leave the flag out"
            )
    missing = [name for name in _FUSIONS if values.get(name)]
    if HAVE_TE or not missing:
        return
    values.update(dict.fromkeys(missing, False))
    if site.rank.rank == 0:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in missing)
        _LOG.warning("%s: Transformer Engine is not installed; plain operations compute the same", flags)


def padded_rows(config: Config, architecture: Architecture) -> int:
    """Rows of embedding and head over all ranks."""
    given, ranks = config[System].padded_vocab_size, config[Parallelism].tensor_model_parallel_size
    if given is not None:
        if given % ranks or given // ranks * (ranks - 1) >= architecture.vocab_size or given < architecture.vocab_size:
            raise TrainingError(
                f"--padded-vocab-size {given} must hold the {architecture.vocab_size} tokens of the checkpoint and "
                f"divide among {ranks} tensor-parallel ranks, so that each has some"
            )
        return given
    return padded_vocabulary(
        architecture.vocab_size,
        config[Megatron].make_vocab_size_divisible_by,
        ranks,
    )
