"""The general layer: any causal language model of transformers whose layers attend through its attention interface.

The model runs on a flat list of rows, as if it were one long sequence; an attention function of ours puts each row's
keys and values where its sequence lives.  What a model does otherwise (activations, scaling, soft caps) stays its own.
A model whose rows do not agree with its own forward pass is refused when it is loaded.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import AttentionInterface, AutoModelForCausalLM, PreTrainedModel, activations
from transformers.modeling_outputs import BaseModelOutput

from miles.core.errors import EngineError
from miles.core.weights.delta import Change
from miles.rollout.engines.embedded.adapters import LowRank, Place
from miles.rollout.engines.embedded.attention import ROW_MULTIPLE, Plan, Segment, attend
from miles.rollout.engines.embedded.elementwise import piecewise
from miles.rollout.engines.embedded.kv import TOKEN_MULTIPLE, KVShape, Pool
from miles.rollout.engines.embedded.model import Checkpoint
from miles.rollout.engines.embedded.weights import WeightStore

_numbers = itertools.count()
_UNSUPPORTED = ("s_aux", "position_bias", "head_mask")
_CHECKED_TOKENS = 8
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.5}
"""Largest difference of log-probabilities between two ways to run a model: far above rounding, far below a mistake."""


class GeneralModel:
    """See the module's text."""

    kind = "general"
    row_multiple = ROW_MULTIPLE

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
        self._attention = _SlotAttention()
        model = _owning_its_memory(AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype=dtype).eval())
        wanted = _own_log_probs(model)
        try:
            model.set_attn_implementation(self._attention.name)
        except ValueError as error:
            raise _refusal(checkpoint, "it does not attend through transformers' attention interface") from error
        self.weights: WeightStore = _GeneralWeights(model)
        self.weights.note_loaded()
        self.adapter_places = _adapter_places(model)
        _replace_activations(model)
        # transformers runs an expert on as many rows as chose it.
        self.batch_invariant = not any("expert" in name for name, _ in model.named_modules())
        config = model.config.get_text_config()
        self.hidden_size: int = config.hidden_size
        self.vocab_size: int = model.get_output_embeddings().weight.shape[0]
        self._base: nn.Module = getattr(model, model.base_model_prefix)
        self._head = _HeadOnly(model)
        self.kv_shape = self._probe(checkpoint, config.num_hidden_layers)
        found = self._row_log_probs()
        difference = float((found - wanted).abs().max())
        if not difference < _TOLERANCE[dtype]:
            raise _refusal(checkpoint, f"its log-probabilities differ by {difference:.2g} from its own forward pass")

    def forward(self, plan: Plan) -> torch.Tensor:
        """See Model."""
        self._attention.plan = plan
        rows = {"input_ids": plan.tokens[None], "position_ids": plan.positions[None]}
        with torch.inference_mode():
            output: BaseModelOutput = self._base(**rows, use_cache=False, return_dict=True)
        self._head.after(output)
        return output.last_hidden_state[0]

    def free_copies(self) -> int:
        """See Model.  transformers keeps none."""
        return 0

    def logits(self, hidden: torch.Tensor, out: torch.Tensor) -> None:
        """See Model."""
        with torch.inference_mode():
            out.copy_(self._head(hidden))

    def _probe(self, checkpoint: Checkpoint, num_layers: int) -> KVShape:
        """What a token stores, found by running the model once without storing anything."""
        zeros = torch.zeros(ROW_MULTIPLE, dtype=torch.int64)
        self.forward(Plan(zeros, zeros, []))
        seen = self._attention.shapes
        if sorted(seen) != list(range(num_layers)):
            raise _refusal(checkpoint, f"{len(seen)} of its {num_layers} layers attend to keys and values")
        if len(set(seen.values())) != 1:
            raise _refusal(checkpoint, f"its layers store different shapes: {sorted(set(seen.values()))}")
        heads, key_dim, value_dim = seen[0]
        return KVShape(num_layers, heads, key_dim, value_dim)

    def _row_log_probs(self) -> torch.Tensor:
        """Log-probabilities of ``_check_tokens`` computed as a block, then two more rows one by one beside another."""
        tokens = _check_tokens(self.vocab_size)
        pool: Pool[None] = Pool(self.kv_shape, TOKEN_MULTIPLE)
        pool.resize(2)
        block = torch.arange(_CHECKED_TOKENS)
        rows = [self._run_rows(pool, tokens[:_CHECKED_TOKENS], block, 1)]
        rows += [
            self._run_rows(pool, tokens[n : n + 1], torch.tensor([n]), 1) for n in range(_CHECKED_TOKENS, len(tokens))
        ]
        return torch.cat(rows)

    def _run_rows(self, pool: Pool[None], tokens: torch.Tensor, positions: torch.Tensor, slot: int) -> torch.Tensor:
        count = len(tokens)
        segment = Segment(pool, slot, TOKEN_MULTIPLE, 0, positions.numpy()[None])
        filling = torch.zeros(-count % ROW_MULTIPLE, dtype=torch.int64)
        plan = Plan(torch.cat([tokens, filling]), torch.cat([positions, filling]), [segment])
        hidden = self.forward(plan)
        logits = torch.empty(hidden.shape[0], self.vocab_size)
        self.logits(hidden, logits)
        return logits[:count].log_softmax(-1)


class _SlotAttention:
    """The attention function of one model, registered with transformers under ``name``."""

    def __init__(self) -> None:
        self.name = f"miles_slots_{next(_numbers)}"
        self.plan: Plan | None = None
        self.shapes: dict[int, tuple[int, int, int]] = {}
        """Layer: (key-value heads, key dimension, value dimension)"""
        AttentionInterface.register(self.name, self)

    def __call__(
        self,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        **options: Any,
    ) -> tuple[torch.Tensor, None]:
        """``query`` is [1, H, M, D], ``key`` and ``value`` [1, K, M, D]; the result is [1, M, H, D]."""
        used = [name for name in _UNSUPPORTED if options.get(name) is not None]
        if used:
            raise EngineError(f"the embedded engine's attention does not support {', '.join(used)}")
        assert self.plan is not None
        layer = int(module.layer_idx)
        self.shapes[layer] = (key.shape[1], key.shape[3], value.shape[3])
        queries, keys, values = (states[0].transpose(0, 1) for states in (query, key, value))
        out = torch.zeros(*queries.shape[:2], values.shape[2], dtype=query.dtype)
        scale = query.shape[3] ** -0.5 if scaling is None else scaling
        attend(self.plan, layer, queries, keys, values, out, scale=scale, window=sliding_window, softcap=softcap)
        return out[None], None


class _Linear:
    """A linear layer that may be given an adapter."""

    def __init__(self, module: nn.Linear) -> None:
        self._module = module
        self.weight: torch.Tensor = module.weight.data
        self._hook: RemovableHandle | None = None

    def attach(self, adapter: LowRank | None) -> None:
        """See Host."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
        if adapter is not None:
            self._hook = self._module.register_forward_hook(partial(_add, adapter))


def _add(adapter: LowRank, module: nn.Linear, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
    adapter.add_to(output.view(-1, module.out_features), inputs[0].reshape(-1, module.in_features))


def _adapter_places(model: PreTrainedModel) -> dict[str, Place]:
    """Every linear layer but the head, by its name in transformers' model."""
    head = model.get_output_embeddings()
    linear = {name: each for name, each in model.named_modules() if isinstance(each, nn.Linear) and each is not head}
    return {name: Place(_Linear(each), range(each.out_features)) for name, each in linear.items()}


class _HeadOnly:
    """Everything after the last hidden state: the head, and what the model does to its logits."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._states = _States()
        setattr(model, model.base_model_prefix, self._states)

    def after(self, output: BaseModelOutput) -> None:
        """Take ``output`` of the base model as the form of its outputs."""
        self._states.output = output

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        self._states.output.last_hidden_state = hidden[None]
        dummy = torch.zeros(1, hidden.shape[0], dtype=torch.int64)
        logits: torch.Tensor = self._model(input_ids=dummy, use_cache=False, return_dict=True).logits[0]
        return logits


def _owning_its_memory(model: PreTrainedModel) -> PreTrainedModel:
    """The same weights in memory that can be released, not in the mapped files of the checkpoint."""
    for tensor in (*model.parameters(), *model.buffers()):
        if not tensor.untyped_storage().resizable():
            tensor.data = tensor.data.clone()
    return model


class _States(nn.Module):  # type: ignore[misc]
    """Stands where the base model was and returns given hidden states."""

    output: BaseModelOutput

    def forward(self, *_: Any, **__: Any) -> BaseModelOutput:
        return self.output


class _GeneralWeights(WeightStore):
    """Weights of a transformers model; tied tensors are held once.

    Experts that are one tensor in the model and one each in checkpoints come under either name.  Layers behind the
    model's own, which predict further tokens, are held and not used.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        views: dict[str, torch.Tensor] = {}
        aliases: dict[str, str] = {}
        fused: dict[str, tuple[torch.Tensor, list[str]]] = {}
        places: dict[tuple[int, torch.Size], str] = {}
        single = _single_experts(model)
        for name, tensor in model.state_dict().items():
            place = (tensor.data_ptr(), tensor.shape)
            if place in places:
                aliases[name] = places[place]
                continue
            places[place] = name
            if name in single:
                fused[name] = (tensor, list(single[name]))
                views |= single[name]
            else:
                views[name] = tensor
        super().__init__(views, aliases, fused=fused)
        self._num_layers = getattr(model.config, "num_hidden_layers", None)

    def check(self, shapes: Iterable[tuple[str, Sequence[int]]], change: Change | None = None) -> None:
        shapes = list(shapes)
        for name, shape in shapes:
            layer = _LAYER.match(name)
            if layer and self._num_layers is not None and int(layer[1]) >= self._num_layers:
                self._views.setdefault(name, torch.zeros(*shape, dtype=next(iter(self._views.values())).dtype))
        super().check(shapes, change)

    def load_directory(self, directory: Path) -> dict[str, torch.dtype]:
        """Through transformers, which knows how checkpoints differ from models."""
        if not (directory / "config.json").exists():
            return super().load_directory(directory)
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=next(iter(self._views.values())).dtype)
        state = model.state_dict()
        for name, tensor in state.items():
            self.write(name, tensor)
        return {name: tensor.dtype for name, tensor in state.items()}


_LAYER = re.compile(r"model\.layers\.(\d+)\.")


def _single_experts(model: PreTrainedModel) -> dict[str, dict[str, torch.Tensor]]:
    """Of every tensor that holds a layer's experts: the tensors of which a checkpoint has it, by their names."""
    found = {}
    for name, module in model.named_modules():
        both, down = getattr(module, "gate_up_proj", None), getattr(module, "down_proj", None)
        if not (isinstance(both, nn.Parameter) and isinstance(down, nn.Parameter)) or both.ndim != 3:
            continue
        if hasattr(module, "gate_up_proj_bias") or both.shape[1] != 2 * down.shape[2]:
            continue  # experts that are one tensor in checkpoints too
        found[f"{name}.gate_up_proj"] = {
            f"{name}.{expert}.{part}_proj.weight": half
            for expert, tensor in enumerate(both.data)
            for part, half in zip(("gate", "up"), tensor.chunk(2), strict=True)
        }
        found[f"{name}.down_proj"] = {
            f"{name}.{expert}.down_proj.weight": tensor for expert, tensor in enumerate(down.data)
        }
    return found


class _Piecewise(nn.Module):  # type: ignore[misc]
    """An activation without parameters, computed so that no element's result depends on its place."""

    def __init__(self, function: nn.Module) -> None:
        super().__init__()
        self.function = function

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return piecewise(self.function, values)


def _replace_activations(model: nn.Module) -> None:
    kinds = tuple({kind[0] if isinstance(kind, tuple) else kind for kind in activations.ACT2CLS.values()})
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, kinds) and not list(child.parameters()):
                setattr(parent, name, _Piecewise(child))


def _check_tokens(vocab_size: int) -> torch.Tensor:
    return torch.arange(1, _CHECKED_TOKENS + 3) * 37 % vocab_size


def _own_log_probs(model: PreTrainedModel) -> torch.Tensor:
    tokens = _check_tokens(model.get_output_embeddings().weight.shape[0])
    with torch.inference_mode():
        logits: torch.Tensor = model(input_ids=tokens[None], use_cache=False).logits[0]
        return logits.float().log_softmax(-1)


def _refusal(checkpoint: Checkpoint, reason: str) -> EngineError:
    return EngineError(f"--model-path {checkpoint.path}: {checkpoint.architecture} cannot be served: {reason}")
