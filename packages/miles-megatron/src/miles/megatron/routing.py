"""Experts chosen once and used again: the engine's (R3), or those of the first forward pass (R2).

Recomputation in the backward pass finds the routers set as in the forward pass before it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import torch
from torch import nn

from megatron.core import parallel_state
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.moe.router_replay import RouterReplay, RouterReplayAction
from megatron.core.transformer.transformer_block import TransformerBlock
from miles.core.errors import TrainingError
from miles.megatron.packed_inputs import PackedInputs


class Routing(Protocol):
    """What the routers of a chunk do in one forward pass."""

    def over(self, chunk: nn.Module, inputs: PackedInputs) -> AbstractContextManager[None]: ...


def routers(chunk: nn.Module) -> Iterator[tuple[int, RouterReplay]]:
    """The routers of ``chunk``, with the numbers that their layers have in the whole model.

    Not those of multi-token prediction, which engines do not record.
    """
    for block in chunk.modules():
        if isinstance(block, TransformerBlock):
            for layer in block.layers:
                for module in layer.mlp.modules():
                    if isinstance(module, TopKRouter):
                        yield layer.layer_number - 1, module.router_replay


class EngineRouting:
    """Every router follows the experts that came with the rollout."""

    def __init__(self, topk: int, sequence_parallel: bool) -> None:
        self._topk = topk
        self._sequence_parallel = sequence_parallel

    @contextmanager
    def over(self, chunk: nn.Module, inputs: PackedInputs) -> Iterator[None]:
        experts_L = self._of_this_rank(inputs)
        for number, replay in routers(chunk):
            replay.target_topk_idx = experts_L[:, number]
            replay.set_router_replay_action(RouterReplayAction.REPLAY_FORWARD)
        yield

    def _of_this_rank(self, inputs: PackedInputs) -> torch.Tensor:
        experts = inputs.experts_L
        if experts is None or experts.shape[2] != self._topk:
            raise TrainingError(
                f"--use-rollout-routing-replay needs {self._topk} recorded experts of every token and layer, and the "
                f"rollout brings {'none' if experts is None else list(experts.shape[1:])} of them"
            )
        if not self._sequence_parallel:
            return experts
        ranks = parallel_state.get_tensor_model_parallel_world_size()
        part: torch.Tensor = experts.chunk(ranks)[parallel_state.get_tensor_model_parallel_rank()]
        return part


class FirstPassRouting:
    """Remembers what routers chose for each micro-batch in the first pass, and lets later passes follow it."""

    def __init__(self) -> None:
        self._chosen: dict[tuple[int, nn.Module], list[torch.Tensor]] = {}
        self._micro_batches: list[object] = []

    def forget(self) -> None:
        """A new rollout."""
        self._chosen.clear()
        self._micro_batches.clear()

    @contextmanager
    def over(self, chunk: nn.Module, inputs: PackedInputs) -> Iterator[None]:
        key = (id(inputs.source), chunk)
        chosen = self._chosen.get(key)
        replays = [replay for _, replay in routers(chunk)]
        for replay, experts in zip(replays, chosen or [None] * len(replays), strict=True):
            replay.target_topk_idx = experts
            action = RouterReplayAction.RECORD if experts is None else RouterReplayAction.REPLAY_FORWARD
            replay.set_router_replay_action(action)
        yield
        if chosen is None:
            self._chosen[key] = [replay.recorded_topk_idx for replay in replays]
            self._micro_batches.append(inputs.source)  # keeps it, and so its identity, alive


def release(chunks: Sequence[nn.Module]) -> None:
    """Let routers choose by themselves again."""
    for chunk in chunks:
        for _, replay in routers(chunk):
            replay.clear_router_replay_action()
            replay.clear_indices()
