"""The samples of one forward pass, packed.

P = tokens of the pack, T = response tokens of its samples, A = response tokens of the whole rollout.  Where ranks share
every sample (context parallelism), P and T are this rank's share.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from miles.core.math.ragged import Ragged
from miles.core.training.context import ContextGroup, ContextSegments
from miles.core.training.segments import Segments
from miles.core.types.batch import Ints, RolloutBatch


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Samples packed without padding.  A prompt that several of them begin with is there once."""

    samples: tuple[int, ...]
    """Positions in the rollout's columns."""
    segments: Segments
    layout: Ragged
    """Where each sample's response tokens lie among the T."""
    tokens_P: torch.Tensor
    positions_P: torch.Tensor
    """Position of each token in its own sample."""
    rows_T: torch.Tensor
    """Token of the pack whose output predicts each response token."""
    targets_T: torch.Tensor
    """The response tokens themselves."""
    columns_T: torch.Tensor
    """Place of each response token in the rollout's columns of A."""
    experts_NLK: Ints | None = None
    """Recorded experts of every token of the whole samples, end to end: [tokens, layers, experts per token].  The last
    token of a sample has none, and -1 in their place."""
    context: ContextGroup | None = None
    """The ranks that hold the other parts of these samples; None: the samples are whole."""

    def whole_samples(self) -> tuple[torch.Tensor, ...]:
        """Prompt and response token ids of each sample."""
        assert self.context is None, "parts of samples do not make whole ones"
        ids: tuple[torch.Tensor, ...] = self.segments.end_to_end.spread(self.tokens_P).split(self.segments.lengths)
        return ids


def response_offsets(batch: RolloutBatch) -> Ints:
    """[samples + 1] where the response of each sample begins in the rollout's columns of A."""
    return np.concatenate([[0], np.cumsum(batch.response_lengths)]).astype(np.int64)


def pack(
    batch: RolloutBatch,
    samples: Sequence[int],
    offsets: Ints,
    device: torch.device,
    context: ContextGroup | None = None,
) -> MicroBatch:
    """The micro-batch of ``samples``, in that order.  ``offsets`` are the rollout's ``response_offsets``."""
    packed = _packed(batch, samples, [batch.response_lengths[i] for i in samples], offsets, device, context)
    return _with_experts(packed, batch)


def pack_filler(
    batch: RolloutBatch, sample: int, offsets: Ints, device: torch.device, context: ContextGroup | None = None
) -> MicroBatch:
    """A micro-batch that computes on ``sample`` and trains on nothing: it keeps a rank without samples in step."""
    return _with_experts(_packed(batch, [sample], [0], offsets, device, context), batch)


def _with_experts(packed: MicroBatch, batch: RolloutBatch) -> MicroBatch:
    if batch.routed_experts is None:
        return packed
    parts = []
    for sample in packed.samples:
        recorded = batch.routed_experts[sample]
        parts += [recorded, np.full((1, *recorded.shape[1:]), -1)]
    return replace(packed, experts_NLK=np.concatenate(parts).astype(np.int64))


def _packed(
    batch: RolloutBatch,
    samples: Sequence[int],
    responses: Sequence[int],
    offsets: Ints,
    device: torch.device,
    context: ContextGroup | None,
) -> MicroBatch:
    pieces = _Pieces()
    for sample, response in zip(samples, responses, strict=True):
        pieces.add(batch.tokens[sample], response)
    lengths = [len(batch.tokens[i]) for i in samples]
    tokens = np.concatenate(pieces.tokens).astype(np.int64, copy=False)
    token_of_position = _ranges(*pieces.spans)
    targets = _ranges(np.cumsum(lengths) - np.asarray(responses, dtype=np.int64), responses)
    held = place_of_token = np.arange(len(tokens))
    if context is None:
        segments = Segments(lengths, device, token_of_position)
    else:
        segments = ContextSegments(lengths, device, token_of_position, pieces.spans, context)
        held, place_of_token = segments.held, segments.place_of_token
    rows = place_of_token[token_of_position[targets - 1]]
    here = rows >= 0
    sample_of_target = np.repeat(np.arange(len(responses)), responses)

    def tensor(array: Ints) -> torch.Tensor:
        return torch.from_numpy(array).to(device, non_blocking=True)

    return MicroBatch(
        samples=tuple(samples),
        segments=segments,
        layout=Ragged(np.bincount(sample_of_target[here], minlength=len(responses)).tolist(), device),
        tokens_P=tensor(tokens[held]),
        positions_P=tensor(np.concatenate(pieces.positions)[held]),
        rows_T=tensor(rows[here]),
        targets_T=tensor(tokens[token_of_position[targets[here]]]),
        columns_T=tensor(_ranges(offsets[list(samples)], responses)[here]),
        context=context,
    )


class _Pieces:
    """Prompts and responses end to end, each prompt once."""

    def __init__(self) -> None:
        self.tokens: list[Ints] = []
        self.positions: list[Ints] = []
        self._starts: list[int] = []
        self._lengths: list[int] = []
        self._start_of_prompt: dict[bytes, int] = {}
        self._num_tokens = 0

    @property
    def spans(self) -> tuple[Ints, Sequence[int]]:
        """Begin and length in the pack of each sample's prompt and response, in turn."""
        return np.asarray(self._starts), self._lengths

    def add(self, tokens: Ints, response: int) -> None:
        prompt_length = len(tokens) - response
        key = tokens[:prompt_length].tobytes()
        start = self._start_of_prompt.get(key)
        if start is None:
            start = self._start_of_prompt[key] = self._append(tokens[:prompt_length], 0)
        self._starts += [start, self._append(tokens[prompt_length:], prompt_length)]
        self._lengths += [prompt_length, response]

    def _append(self, tokens: Ints, first_position: int) -> int:
        start = self._num_tokens
        self.tokens.append(tokens)
        self.positions.append(np.arange(first_position, first_position + len(tokens)))
        self._num_tokens += len(tokens)
        return start


def _ranges(starts: Ints, lengths: Sequence[int]) -> Ints:
    """``starts[0], starts[0] + 1, ...`` for ``lengths[0]`` entries, then the same from ``starts[1]``, and so on."""
    counts = np.asarray(lengths, dtype=np.int64)
    before = np.cumsum(counts) - counts
    return np.repeat(starts - before, counts) + np.arange(counts.sum())
