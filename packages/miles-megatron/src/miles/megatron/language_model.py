"""Megatron-Core's GPT around packed samples: log-probabilities of given tokens, never logits of all.

L = tokens of a row on this context-parallel rank, T = response tokens of a micro-batch, U = those predicted on this
rank, N = tokens of its samples, D = hidden size, V = vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch

from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    gather_from_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from miles.core.math.logprobs import LogProbs, linear_logprobs
from miles.core.training.model import Output
from miles.megatron.packed_inputs import Ahead, PackedInputs, SegmentedSeqParams
from miles.megatron.site import vocabulary_shard


class LanguageModel(GPTModel):  # type: ignore[misc]
    """A stage of the model.  Its forward pass ends with hidden states; ``Head`` makes the rest of them."""

    def forward(self, inputs: PackedInputs) -> torch.Tensor:
        """[L, 1, D] hidden states, divided among tensor-parallel ranks under sequence parallelism.

        Where multi-token prediction is trained, those of its layers follow.
        """
        hidden_L1D: torch.Tensor = super().forward(
            inputs.tokens_1L,
            inputs.positions_1L,
            None,
            packed_seq_params=inputs.borders,
            # Megatron-Core hands on what it is told here, and looks at it only in what is overridden below.
            labels=inputs.ahead,
        )
        return hidden_L1D

    def _postprocess(
        self,
        hidden_states: torch.Tensor,
        *,
        labels: tuple[Ahead, ...],
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        packed_seq_params: SegmentedSeqParams,
        rotary_pos_emb: torch.Tensor | None,
        **kwargs: Any,
    ) -> torch.Tensor:
        if not (labels and self.mtp_process):
            return hidden_states
        # Only the layers of multi-token prediction learn: trunk, embedding and head are cut off from their loss.
        states: torch.Tensor = self.mtp(
            input_ids=input_ids,
            position_ids=position_ids,
            # Recomputation takes part in a backward pass only for inputs that want a gradient.
            hidden_states=hidden_states.detach().requires_grad_(),
            attention_mask=None,
            rotary_pos_emb=rotary_pos_emb,
            packed_seq_params=packed_seq_params,
            embedding=lambda **tokens: self.embedding(**tokens).detach(),
        )
        return torch.cat([hidden_states, states[len(hidden_states) :]])

    def head_weight(self) -> torch.Tensor:
        """This rank's rows of the output head."""
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        return self.output_layer.weight


class Head:
    """From hidden states to log-probabilities or logits, divided by the temperature."""

    def __init__(self, *, vocab_size: int, padded: int, temperature: float, chunk_size: int | None) -> None:
        ranks = parallel_state.get_tensor_model_parallel_world_size()
        first = parallel_state.get_tensor_model_parallel_rank() * (padded // ranks)
        self._rows = min(padded // ranks, vocab_size - first)
        self._vocab_size = vocab_size
        self._shard = vocabulary_shard(first)
        self._temperature = temperature
        self._chunk_size = chunk_size

    def __call__(self, model: LanguageModel, hidden: torch.Tensor, inputs: PackedInputs, output: Output) -> Any:
        """``LogProbs`` [T], or logits [N, V]; the same on all ranks that share the samples."""
        hidden_LD = _whole_sequence(model, hidden)
        if output == "logits":
            return self._logits(model, hidden_LD, inputs)
        return self._log_probs(model, hidden_LD, inputs, with_entropy=output == "entropy")

    def _log_probs(
        self, model: LanguageModel, hidden_LD: torch.Tensor, inputs: PackedInputs, *, with_entropy: bool
    ) -> LogProbs:
        scores = linear_logprobs(
            hidden_LD.index_select(0, inputs.rows_U),
            model.head_weight()[: self._rows],
            inputs.targets_U,
            temperature=self._temperature,
            chunk_size=self._chunk_size,
            with_entropy=with_entropy,
            shard=self._shard,
        )
        return LogProbs(*(None if part is None else whole_samples(part, inputs) for part in scores))

    def log_probs_ahead(self, model: LanguageModel, hidden: torch.Tensor, ahead: Ahead) -> torch.Tensor:
        """[U] of the tokens that a layer of multi-token prediction predicts, at temperature 1.  The head has no part
        in the gradient."""
        scores = linear_logprobs(
            _whole_sequence(model, hidden).index_select(0, ahead.rows_U),
            model.head_weight()[: self._rows].detach(),
            ahead.targets_U,
            chunk_size=self._chunk_size,
            shard=self._shard,
        )
        return scores.logp_T

    def _logits(self, model: LanguageModel, hidden_LD: torch.Tensor, inputs: PackedInputs) -> torch.Tensor:
        hidden_ND = hidden_LD.index_select(0, inputs.tokens_N)
        part = torch.nn.functional.linear(copy_to_tensor_model_parallel_region(hidden_ND), model.head_weight())
        logits_NV: torch.Tensor = gather_from_tensor_model_parallel_region(part)
        return logits_NV[:, : self._vocab_size].float() / self._temperature


def _whole_sequence(model: LanguageModel, hidden: torch.Tensor) -> torch.Tensor:
    """[L, D] on every tensor-parallel rank."""
    if model.config.sequence_parallel:
        # The head sums gradients of hidden states over its ranks itself; each takes its part of the sequence back.
        hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False)
    return hidden.squeeze(1)


def whole_samples(part_U: torch.Tensor, inputs: PackedInputs) -> torch.Tensor:
    """[T] from the parts [U] of all context-parallel ranks.  A part's gradient is that of its own tokens."""
    if inputs.borders.layout.context_size == 1:
        return part_U
    whole_T = part_U.new_zeros(inputs.num_targets).index_copy(0, inputs.slots_U, part_U)
    summed_T: torch.Tensor = reduce_from_tensor_model_parallel_region(
        whole_T, group=parallel_state.get_context_parallel_group()
    )
    return summed_T
