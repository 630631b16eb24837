"""The model on this rank: forward to log-probabilities, backward, optimizer step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from miles.core.math.logprobs import LogProbs, linear_logprobs
from miles.core.training.loss_scaling import LossScaler
from miles.core.training.micro_batch import MicroBatch
from miles.core.training.model import Output, StepLoss
from miles.fsdp.layout import Layout, Packed
from miles.fsdp.lora import adapters_off, is_adapter

PACKED = Packed()


class RankModule(nn.Module):  # type: ignore[misc]
    """A language model around packed samples.  A subclass says what is computed from its last hidden states."""

    def __init__(self, lm: PreTrainedModel, layout: Layout = PACKED) -> None:
        super().__init__()
        self.lm = lm
        self.layout = layout

    def hidden(self, batch: MicroBatch) -> torch.Tensor:
        """[P, D] last hidden states of the pack."""
        return self.layout.hidden(self.lm.base_model, batch)

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """By the names of the language model: all, or those of its adapters."""
        parameters = dict(self.lm.named_parameters())
        adapters = {name: parameter for name, parameter in parameters.items() if is_adapter(name)}
        return adapters or parameters


class PolicyModule(RankModule):
    """Body and head of ``lm`` around packed samples: log-probabilities of given tokens, never logits of all.

    The head's product is taken inside this module's forward, so that a sharded head is whole when it is used.
    """

    def __init__(
        self, lm: PreTrainedModel, *, temperature: float, chunk_size: int | None, layout: Layout = PACKED
    ) -> None:
        super().__init__(lm, layout)
        self.temperature = temperature
        self._chunk_size = chunk_size
        self._logit_scale = _logit_scale(lm)

    def forward(self, batch: MicroBatch, output: Output) -> LogProbs | torch.Tensor:
        hidden_PD = self.hidden(batch)
        if self._logit_scale != 1.0:
            hidden_PD = hidden_PD * self._logit_scale
        if output == "logits":
            logits_PV = self.lm.get_output_embeddings()(hidden_PD).float() / self.temperature
            return batch.segments.end_to_end.spread(logits_PV)
        return self._log_probs(hidden_PD.index_select(0, batch.rows_T), batch.targets_T, output == "entropy")

    def _log_probs(self, hidden_TD: torch.Tensor, target_T: torch.Tensor, with_entropy: bool) -> LogProbs:
        head = self.lm.get_output_embeddings()
        return linear_logprobs(
            hidden_TD,
            head.weight,
            target_T,
            bias_V=head.bias,
            temperature=self.temperature,
            chunk_size=self._chunk_size,
            with_entropy=with_entropy,
        )


def _logit_scale(lm: PreTrainedModel) -> float:
    """By how much a model multiplies (Cohere) or divides (Granite) its logits."""
    config = lm.config
    return float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)


class FrozenPolicy:
    """A model that only scores."""

    def __init__(self, module: PolicyModule) -> None:
        self.module = module.requires_grad_(False)

    def named_parameters(self) -> dict[str, nn.Parameter]:
        return _sharded_parameters(self.module)

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def follow(self, module: PolicyModule) -> None:
        """Take the weights of ``module``, which is sharded alike."""
        own, new = _sharded_parameters(self.module), _sharded_parameters(module)
        for name, parameter in own.items():
            parameter.copy_(new[name])

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def score(self, micro_batches: Sequence[MicroBatch], *, with_entropy: bool = False) -> list[LogProbs]:
        return _scores(self.module, micro_batches, with_entropy=with_entropy)


class BasePolicy:
    """The model that adapters are trained on, without them: a reference that takes no memory of its own."""

    def __init__(self, module: PolicyModule) -> None:
        self._module = module

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def score(self, micro_batches: Sequence[MicroBatch], *, with_entropy: bool = False) -> list[LogProbs]:
        with adapters_off(self._module):
            return _scores(self._module, micro_batches, with_entropy=with_entropy)


@dataclass(frozen=True, slots=True)
class Gradients:
    """What happens to gradients between backward pass and step."""

    num_ranks: int = 1
    """So many ranks average them; their sum is wanted."""
    max_norm: float = 0.0
    """Their norm is clipped to this; 0: not at all."""
    scaler: LossScaler | None = None
    """Keeps them within fp16."""


class Trained:
    """A model being trained."""

    def __init__(self, module: RankModule, optimizer: torch.optim.Optimizer, gradients: Gradients) -> None:
        self.module = module
        self.optimizer = optimizer
        self._num_ranks = gradients.num_ranks
        self._max_norm = gradients.max_norm or math.inf
        self._scaler = gradients.scaler

    def accumulate(self, micro_batches: Sequence[MicroBatch], output: Output, loss: StepLoss) -> None:
        for number, micro_batch in enumerate(micro_batches):
            self._backward(loss(number, self.module(micro_batch, output)), last=number + 1 == len(micro_batches))

    def _backward(self, loss: torch.Tensor, *, last: bool) -> None:
        """Add a micro-batch's gradient.  After the ``last`` one gradients are summed over ranks."""
        if isinstance(self.module, FSDPModule):
            self.module.set_requires_gradient_sync(last)
            loss = loss * self._num_ranks  # the ranks' gradients are averaged; their sum is wanted
        if self._scaler is not None:
            loss = loss * self._scaler.scale
        loss.backward()

    def step(self, learning_rate: float) -> float:
        parameters = [p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        if self._scaler is not None:
            for parameter in parameters:
                parameter.grad.div_(self._scaler.scale)
        norm = whole(torch.nn.utils.get_total_norm([p.grad for p in parameters]))
        norm_value = float(norm)
        if math.isfinite(norm_value):
            torch.nn.utils.clip_grads_with_norm_(parameters, self._max_norm, norm)
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate
            self.optimizer.step()
        if self._scaler is not None:
            self._scaler.stepped() if math.isfinite(norm_value) else self._scaler.overflowed()
        self.optimizer.zero_grad()
        return norm_value

    def drop_gradient(self) -> None:
        self.optimizer.zero_grad()

    def reset_optimizer(self) -> None:
        self.optimizer.state.clear()

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """This rank's shards, by the names of the language model."""
        return _sharded_parameters(self.module)

    def whole_lm(self) -> PreTrainedModel:
        """The language model, with its weights at rest."""
        _put_to_rest(self.module)
        return self.module.lm

    def move(self, device: torch.device) -> None:
        """Move weights and optimizer state."""
        _put_to_rest(self.module)
        self.module.to(device)
        for state in self.optimizer.state.values():
            state.update({name: value.to(device) for name, value in state.items()})


class Policy(Trained):
    """The actor's model being trained."""

    module: PolicyModule

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def score(self, micro_batches: Sequence[MicroBatch], *, with_entropy: bool = False) -> list[LogProbs]:
        return _scores(self.module, micro_batches, with_entropy=with_entropy)


def _scores(module: PolicyModule, micro_batches: Sequence[MicroBatch], *, with_entropy: bool) -> list[LogProbs]:
    """Through the module's call, whose hooks gather sharded weights."""
    return [module(micro_batch, "entropy" if with_entropy else "logprobs") for micro_batch in micro_batches]


def _sharded_parameters(module: RankModule) -> dict[str, nn.Parameter]:
    _put_to_rest(module)
    return module.trained_parameters()


def _put_to_rest(module: RankModule) -> None:
    """The root keeps its weights whole after a forward pass; give the shards their places back."""
    if isinstance(module, FSDPModule):
        module.reshard()


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor`` with the shards of all ranks.  Collective when it is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
