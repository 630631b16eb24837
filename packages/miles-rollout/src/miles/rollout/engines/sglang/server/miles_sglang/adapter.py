# mypy: disable-error-code="import-not-found,no-untyped-call"
"""The policy's adapter, which every request gets that names none.

SGLang knows adapters by ids.  The policy's has one of its own from the start, without tensors until an update brings
them: the bucket of an update (see ``weights``) describes it as ``adapter``: ``{"rank", "alpha", "layers"}``.  Its
tensors are replaced in place, so that requests under way go on with new ones as they do with new weights.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from functools import wraps
from typing import Any

import torch
import xxhash
from sglang.srt.lora.lora_config import LoRAConfig
from sglang.srt.lora.lora_manager import LoRAManager
from sglang.srt.lora.lora_registry import LoRARef
from sglang.srt.managers.tokenizer_manager import TokenizerManager
from sglang.srt.model_executor.model_runner_components.weight_updater import WeightUpdater
from sglang.srt.runtime_context import get_lora

from miles_sglang.shared_bucket import SharedBucket

POLICY = LoRARef(lora_id="miles-policy", lora_name="miles-policy", lora_path="__tensor__", pinned=False)
_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Layers that SGLang holds as one: it takes adapters of all of them or of none."""


def install() -> None:
    """Give servers that are started for adapters (``--enable-lora``) the policy's."""
    LoRAManager.init_state = _with_the_policys(LoRAManager.init_state)
    TokenizerManager._validate_and_resolve_lora = _or_the_policys(TokenizerManager._validate_and_resolve_lora)
    WeightUpdater.update_weights_from_tensor = _or_of_an_adapter(WeightUpdater.update_weights_from_tensor)


def _with_the_policys(init_state: Any) -> Any:
    @wraps(init_state)
    def initialize(self: Any, *args: Any, **named: Any) -> None:
        init_state(self, *args, **named)
        self.miles_tensors = {}
        self.lora_refs[POLICY.lora_id] = POLICY
        _load(self, rank=self.max_lora_rank, alpha=self.max_lora_rank)

    return initialize


def _or_the_policys(resolve: Any) -> Any:
    @wraps(resolve)
    async def of_request(self: Any, request: Any) -> None:
        if request.lora_path or not get_lora().enable_lora:
            await resolve(self, request)
            return
        request.lora_id = POLICY.lora_id if request.is_single else [POLICY.lora_id] * len(request.rid)
        for single in request.__dict__.get("_sub_obj_cache", {}).values():
            single.lora_id = POLICY.lora_id

    return of_request


def _or_of_an_adapter(update: Any) -> Any:
    @wraps(update)
    def update_weights(self: Any, named_tensors: Any, load_format: str | None = None) -> tuple[bool, str]:
        if not isinstance(named_tensors, dict) or "adapter" not in named_tensors:
            answer: tuple[bool, str] = update(self, named_tensors=named_tensors, load_format=load_format)
            return answer
        manager = self.get_model_runner().lora_manager
        if manager is None:
            return False, "this server was started without --enable-lora"
        try:
            return True, json.dumps({"checksums": take_bucket(manager, named_tensors)})
        except Exception as error:
            return False, f"{type(error).__name__}: {error}"

    return update_weights


def take_bucket(manager: Any, layout: Mapping[str, Any]) -> dict[str, str]:
    """Hold the tensors, and serve them once all of the adapter's are there.  XXH3-64 of each, as 16 hex digits."""
    form, bucket = layout["adapter"], SharedBucket(layout)
    wanted = {f"{layer}.{part}.weight" for layer in form["layers"] for part in ("lora_A", "lora_B")}
    bucket.wait()
    taken = {name: tensor.clone() for name, tensor in bucket.tensors.items()}
    held = {name: tensor for name, tensor in manager.miles_tensors.items() if name in wanted}
    manager.miles_tensors = held | taken
    if manager.miles_tensors.keys() == wanted:
        _load(manager, rank=form["rank"], alpha=form["alpha"])
    return {
        name: xxhash.xxh3_64_hexdigest(tensor.contiguous().view(torch.uint8).numpy()) for name, tensor in taken.items()
    }


def _load(manager: Any, *, rank: int, alpha: float) -> None:
    """Serve the tensors that are held; the next batch finds them in the memory of adapters."""
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": sorted(manager.target_modules),
    }
    lora_config = LoRAConfig.from_dict(config, base_vocab_size=manager.base_hf_config.vocab_size)
    if not manager.memory_pool.can_support(lora_config):
        raise ValueError(f"rank {rank} is beyond --max-lora-rank {manager.max_lora_rank}")
    manager.configs[POLICY.lora_id] = lora_config
    complete = _completed(manager.miles_tensors, manager.base_hf_config)
    manager.load_lora_weights_from_tensors(POLICY, {f"base_model.model.{name}": t for name, t in complete.items()})
    slot = manager.memory_pool.remove_lora(POLICY.lora_id)
    if slot is not None:
        manager._notify_lora_slots_updated({slot})


def _completed(tensors: Mapping[str, torch.Tensor], config: Any) -> dict[str, torch.Tensor]:
    """With zeros for layers that SGLang wants beside others."""
    complete = dict(tensors)
    for name, tensor in tensors.items():
        layer, part, _ = name.rsplit(".", 2)
        parent, _, own = layer.rpartition(".")
        for other in _beside(own):
            missing = f"{parent}.{other}.{part}.weight"
            if missing not in tensors:
                rows = tensor.shape[0] if part == "lora_A" else _outputs(other, config)
                complete[missing] = tensor.new_zeros(rows, tensor.shape[1])
    return complete


def _beside(layer: str) -> Iterable[str]:
    return next((group for group in _FUSED if layer in group), ())


def _outputs(layer: str, config: Any) -> int:
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    counts = {"q_proj": heads * size, "k_proj": config.num_key_value_heads * size}
    counts["v_proj"] = counts["k_proj"]
    return int(counts.get(layer, config.intermediate_size))
