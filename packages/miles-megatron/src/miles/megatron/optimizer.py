"""Gradients and their optimizer, as Megatron-Core does both."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist

from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.optimizer import ChainedOptimizer
from megatron.core.transformer.transformer_config import TransformerConfig
from miles.core.flags.optimizer import Optimizer
from miles.core.training.loss_scaling import LossScaler
from miles.megatron.flags import Parallelism
from miles.megatron.language_model import LanguageModel


def with_gradients(
    chunks: Sequence[LanguageModel], config: TransformerConfig, flags: Optimizer, parallel: Parallelism
) -> list[DistributedDataParallel]:
    """``chunks`` with buffers for their gradients, which are summed over data-parallel ranks."""
    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=parallel.accumulate_allreduce_grads_in_fp32,
        use_distributed_optimizer=_divides_state(flags, parallel),
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather and _divides_state(flags, parallel),
    )
    wrapped = [
        DistributedDataParallel(config, settings, chunk, disable_bucketing=number > 0)
        for number, chunk in enumerate(chunks)
    ]
    config.finalize_model_grads_func = _finalize
    if parallel.overlap_grad_reduce:
        config.no_sync_func = _only_or_all([chunk.no_sync for chunk in wrapped])
        config.grad_sync_func = _only_or_all([chunk.start_grad_sync for chunk in wrapped])
    if settings.overlap_param_gather:
        config.param_sync_func = _only_or_all([chunk.start_param_sync for chunk in wrapped])
    return wrapped


def _divides_state(flags: Optimizer, parallel: Parallelism) -> bool:
    """Plain SGD has no state to divide, and Megatron-Core's distributed optimizer does not take it."""
    return parallel.use_distributed_optimizer and flags.optimizer == "adam"


def _finalize(chunks: Sequence[DistributedDataParallel], num_tokens: Any = None, **kwargs: Any) -> None:
    """Reduce gradients over all ranks that share a weight.  Losses are divided already, so nothing is divided here."""
    finalize_model_grads(chunks, None, **kwargs)


def _only_or_all(functions: list[Any]) -> Any:
    """The schedules take a function without virtual stages and a list of them with."""
    return functions[0] if len(functions) == 1 else functions


class Updater:
    """Clips gradients and takes optimizer steps."""

    def __init__(
        self,
        flags: Optimizer,
        parallel: Parallelism,
        chunks: Sequence[DistributedDataParallel],
        dtype: torch.dtype,
    ) -> None:
        self._chunks = list(chunks)
        self._gathers_late = parallel.overlap_param_gather and _divides_state(flags, parallel)
        self._max_norm = flags.clip_grad or math.inf
        self.scaler = LossScaler() if dtype == torch.float16 else None
        self.optimizer: ChainedOptimizer = get_megatron_optimizer(
            OptimizerConfig(
                optimizer=flags.optimizer,
                lr=flags.lr,
                weight_decay=flags.weight_decay,
                adam_beta1=flags.adam_beta1,
                adam_beta2=flags.adam_beta2,
                adam_eps=flags.adam_eps,
                sgd_momentum=0.0,
                clip_grad=self._max_norm,
                bf16=dtype == torch.bfloat16,
                fp16=dtype == torch.float16,
                # Divides by what it is told before every step; one scale for all its parts.
                loss_scale=None if self.scaler is None else 1.0,
                params_dtype=dtype,
                use_distributed_optimizer=_divides_state(flags, parallel),
                overlap_param_gather=self._gathers_late,
            ),
            self._chunks,
        )

    def clear(self) -> None:
        """Forget the gradients."""
        for chunk in self._chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()

    def step(self, learning_rate: float) -> float:
        """See ``Model.step``."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        norm = math.inf if self._overflows() else float(self.optimizer.get_grad_norm())
        if math.isfinite(norm):
            self._clip(norm)
            self.optimizer.step_with_ready_grads()
        if self.scaler is not None:
            self.scaler.stepped() if math.isfinite(norm) else self.scaler.overflowed()
        self.clear()
        return norm

    def scaled(self, loss: torch.Tensor) -> torch.Tensor:
        """What the backward pass begins with."""
        return loss if self.scaler is None else loss * self.scaler.scale

    def _overflows(self) -> bool:
        """Take the gradients without their scale; whether one is not finite, on any rank."""
        if self.scaler is None:
            return bool(self.optimizer.prepare_grads())
        for part in self._parts():
            part.grad_scaler._scale.fill_(self.scaler.scale)
        found = torch.tensor(float(self.optimizer.prepare_grads()), device=torch.cuda.current_device())
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
        return bool(found)

    def settle(self) -> None:
        """Have whole weights on every rank, also where they are gathered during the next forward pass.  Collective."""
        if self._gathers_late:
            for chunk in self._chunks:
                chunk.start_param_sync(force_sync=True)

    def reset(self) -> None:
        """Forget moments and step counts."""
        for part in self._parts():
            for state in part.optimizer.state.values():
                for value in state.values():
                    value.zero_()
            for group in part.optimizer.param_groups:
                group["step"] = 0

    def reload_weights(self) -> None:
        """Take the model's weights as the optimizer's own, after something else changed them."""
        self.optimizer.reload_model_params()

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def complete_state(self) -> None:
        """Create the state that the first step would create, and change nothing."""
        for part in self._parts():
            if part.optimizer.state:
                continue
            for group in part.optimizer.param_groups:
                group["lr"] = 0.0
                for parameter in group["params"]:
                    parameter.grad = torch.zeros_like(parameter) if parameter.numel() else None
            part.optimizer.step()
            part.optimizer.zero_grad()
            for group in part.optimizer.param_groups:
                group["step"] = 0

    def state_tensors(self) -> Iterator[torch.Tensor]:
        """The optimizer's own weights and moments, and the memory that the model's weights are views of."""
        for part in self._parts():
            for group in part.optimizer.param_groups:
                yield from group["params"]
            for state in part.optimizer.state.values():
                yield from (value for value in state.values() if torch.is_tensor(value))
        yield from (buffer.param_data for buffer in self._buffers() if buffer.param_data is not None)

    def gradients(self) -> Iterator[torch.Tensor]:
        """The memory of all gradients, which are zero between steps."""
        yield from (buffer.grad_data for buffer in self._buffers() if buffer.grad_data is not None)

    def _buffers(self) -> Iterator[Any]:
        for chunk in self._chunks:
            yield from (*chunk.buffers, *chunk.expert_parallel_buffers)

    def _clip(self, norm: float) -> None:
        for part in self._parts():
            if parameters := part.get_parameters():
                clip_grad_by_total_norm_fp32(
                    parameters,
                    max_norm=self._max_norm,
                    total_norm=norm,
                    use_decoupled_grad=part.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8,
                )

    def _parts(self) -> list[Any]:
        """The optimizers of dense weights and of experts, where this rank has any."""
        return [part for part in self.optimizer.chained_optimizers if not getattr(part, "is_stub_optimizer", False)]
