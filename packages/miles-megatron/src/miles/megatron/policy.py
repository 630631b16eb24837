"""The model on this rank: whole optimizer steps and scoring passes through Megatron-Core's schedules."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist

from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from miles.core.math.logprobs import LogProbs
from miles.core.training.micro_batch import MicroBatch
from miles.core.training.model import Output, StepLoss
from miles.core.training.tagged_weights import TaggedWeights
from miles.megatron.language_model import LanguageModel
from miles.megatron.lora import Adapters
from miles.megatron.multi_token import MultiTokenLoss
from miles.megatron.optimizer import Updater
from miles.megatron.packed_inputs import Layout, PackedInputs
from miles.megatron.routing import Routing, release

Numbered = Iterator[tuple[int, PackedInputs]]
Step = Callable[[Numbered, LanguageModel], tuple[torch.Tensor, Callable[..., Any]]]


class Passes:
    """Runs micro-batches through the stages.  ``chunks`` may be wrapped for gradients."""

    def __init__(
        self,
        chunks: Sequence[torch.nn.Module],
        head: Callable[[LanguageModel, torch.Tensor, PackedInputs, Output], Any],
        layout: Layout,
        *,
        routing: Routing | None = None,
        before_scoring: Callable[[Sequence[torch.nn.Module]], None] | None = None,
        multi_token: MultiTokenLoss | None = None,
    ) -> None:
        self._chunks = list(chunks)
        self._head = head
        self._layout = layout
        self._routing = routing
        self._before_scoring = before_scoring
        self._multi_token = multi_token
        self._schedule = get_forward_backward_func()

    def score(self, micro_batches: Sequence[MicroBatch], *, with_entropy: bool) -> list[LogProbs]:
        """Log-probabilities of each micro-batch, on every stage.  No graph."""
        if self._before_scoring is not None:
            self._before_scoring(self._chunks)
        if with_entropy:
            return [LogProbs(*rows) for rows in self._outputs(micro_batches, "entropy", 2)]
        return [LogProbs(logp_T) for (logp_T,) in self._outputs(micro_batches, "logprobs", 1)]

    def values(self, micro_batches: Sequence[MicroBatch]) -> list[torch.Tensor]:
        """Values of each micro-batch, on every stage.  No graph."""
        return [value_T for (value_T,) in self._outputs(micro_batches, "values", 1)]

    def _outputs(
        self, micro_batches: Sequence[MicroBatch], output: Output, num_rows: int
    ) -> list[tuple[torch.Tensor, ...]]:
        """``num_rows`` rows [T] of each micro-batch's output, on every stage."""

        def collect(
            number: int, model: LanguageModel, hidden: torch.Tensor, inputs: PackedInputs, **kwargs: Any
        ) -> tuple[torch.Tensor, ...]:
            found = self._head(model, hidden, inputs, output)
            return (found,) if isinstance(found, torch.Tensor) else tuple(found)[:num_rows]

        with torch.no_grad():
            rows = self._run(micro_batches, collect, forward_only=True)
        return _on_all_stages(rows, micro_batches, num_rows)

    def accumulate(self, micro_batches: Sequence[MicroBatch], output: Output, loss: StepLoss) -> None:
        """Forward and backward passes; gradients are summed over all ranks at the end."""
        multi_token = self._multi_token
        layers = 0 if multi_token is None else multi_token.layers

        def differentiate(
            number: int, model: LanguageModel, hidden: torch.Tensor, inputs: PackedInputs
        ) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
            hidden, *states = hidden.chunk(1 + layers)
            value = loss(number, self._head(model, hidden, inputs, output))
            if multi_token is not None:
                value = value + multi_token(model, states, inputs)
            return value, torch.ones((), dtype=torch.int, device=value.device), {}

        if multi_token is not None:
            multi_token.begin_step(micro_batches)
        self._run(micro_batches, differentiate, forward_only=False, layers_ahead=layers)

    def _run(
        self,
        micro_batches: Sequence[MicroBatch],
        use: Callable[..., Any],
        *,
        forward_only: bool,
        layers_ahead: int = 0,
    ) -> list[Any]:
        """What ``use`` makes of the output of each micro-batch; nothing on stages without output."""
        inputs = [PackedInputs.of(micro_batch, self._layout, layers_ahead) for micro_batch in micro_batches]

        def step(data: Numbered, chunk: torch.nn.Module) -> tuple[torch.Tensor, Callable[..., Any]]:
            number, packed = next(data)
            with nullcontext() if self._routing is None else self._routing.over(_bare(chunk), packed):
                hidden = chunk(packed)

            def finish(hidden: torch.Tensor, **kwargs: Any) -> Any:
                return use(number, _bare(chunk), hidden, packed, **kwargs)

            return hidden, finish

        results: list[Any] = self._schedule(
            forward_step_func=step,
            data_iterator=[enumerate(inputs) for _ in self._chunks],
            model=self._chunks,
            num_microbatches=len(inputs),
            seq_length=inputs[0].tokens_1L.shape[1],
            micro_batch_size=1,
            forward_only=forward_only,
            collect_non_loss_data=forward_only,
        )
        if self._routing is not None:
            release(self._chunks)
        return results


def _bare(chunk: torch.nn.Module) -> LanguageModel:
    """The model inside its wrapper."""
    return chunk if isinstance(chunk, LanguageModel) else _bare(chunk.module)


def _on_all_stages(
    rows: Sequence[tuple[torch.Tensor, ...]], micro_batches: Sequence[MicroBatch], num_rows: int
) -> list[tuple[torch.Tensor, ...]]:
    """What the last stage has, on every stage.  Collective."""
    if parallel_state.get_pipeline_model_parallel_world_size() == 1:
        return list(rows)
    sizes = [len(micro_batch.targets_T) for micro_batch in micro_batches]
    flat = torch.zeros(num_rows, sum(sizes), device=micro_batches[0].tokens_P.device)
    if rows:
        flat.copy_(torch.stack([torch.cat(row) for row in zip(*rows, strict=True)]))
    group = parallel_state.get_pipeline_model_parallel_group()
    dist.broadcast(flat, parallel_state.get_pipeline_model_parallel_last_rank(), group=group)
    return list(zip(*(row.split(sizes) for row in flat), strict=True))


class Trained:
    """The model being trained."""

    def __init__(self, passes: Passes, updater: Updater, before_step: Callable[[], None] | None = None) -> None:
        self._passes = passes
        self._updater = updater
        self._before_step = before_step

    def accumulate(self, micro_batches: Sequence[MicroBatch], output: Output, loss: StepLoss) -> None:
        if self._before_step is not None:
            self._before_step()
        self._passes.accumulate(micro_batches, output, loss)

    def step(self, learning_rate: float) -> float:
        return self._updater.step(learning_rate)

    def drop_gradient(self) -> None:
        self._updater.clear()

    def reset_optimizer(self) -> None:
        self._updater.reset()


class MegatronPolicy(Trained):
    """The actor's model."""

    def score(self, micro_batches: Sequence[MicroBatch], *, with_entropy: bool = False) -> list[LogProbs]:
        return self._passes.score(micro_batches, with_entropy=with_entropy)


class MegatronValues(Trained):
    """The critic's model."""

    def values(self, micro_batches: Sequence[MicroBatch]) -> list[torch.Tensor]:
        return self._passes.values(micro_batches)


class TaggedPolicy:
    """The same model with other weights, which only scores."""

    def __init__(self, passes: Passes, weights: TaggedWeights, tag: str) -> None:
        self._passes = passes
        self._weights = weights
        self._tag = tag

    def score(self, micro_batches: Sequence[MicroBatch], *, with_entropy: bool = False) -> list[LogProbs]:
        with self._weights.swapped_in(self._tag):
            return self._passes.score(micro_batches, with_entropy=with_entropy)


class BasePolicy:
    """The model that adapters are trained on, without them: a reference that takes no memory of its own."""

    def __init__(self, passes: Passes, adapters: Adapters) -> None:
        self._passes = passes
        self._adapters = adapters

    def score(self, micro_batches: Sequence[MicroBatch], *, with_entropy: bool = False) -> list[LogProbs]:
        with self._adapters.off():
            return self._passes.score(micro_batches, with_entropy=with_entropy)
