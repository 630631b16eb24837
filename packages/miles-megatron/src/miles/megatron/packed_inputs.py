"""A micro-batch as Megatron-Core takes it: samples end to end in one row, with their borders (``thd``).

Samples are padded at their end, where padding changes nothing that comes before it: each to a multiple of twice the
context-parallel ranks, and the last one so that the sequence divides among tensor-parallel ranks.

L = tokens of the row on this context-parallel rank, T = response tokens of the samples, U = those predicted on this
rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from megatron.core.packed_seq_params import PackedSeqParams
from miles.core.training.micro_batch import MicroBatch
from miles.core.training.segments import Segments
from miles.core.types.batch import Ints


@dataclass(frozen=True, slots=True)
class Layout:
    """What the length of a row must divide by, and which part of every sample this rank holds."""

    context_size: int = 1
    context_rank: int = 0
    sequence_shards: int = 1
    """Tensor-parallel ranks that the sequence is divided among."""
    multiple: int = 1
    """Of this many tokens is the part of each of these ranks (``--data-pad-size-multiplier``)."""

    def padded(self, lengths: Sequence[int]) -> list[int]:
        """Tokens of each sample with its padding."""
        unit = 2 * self.context_size if self.context_size > 1 else 1
        padded = [-(-length // unit) * unit for length in lengths]
        own, step = sum(padded) // self.context_size, unit // self.context_size
        filled = own
        while filled % (self.sequence_shards * self.multiple):
            filled += step
        padded[-1] += (filled - own) * self.context_size
        return padded

    def own(self, lengths: Sequence[int]) -> Ints:
        """Places in the whole row of this rank's tokens: of each sample a chunk from its front and the mirrored one."""
        return self.places(lengths, self.context_rank)

    def places(self, lengths: Sequence[int], rank: int) -> Ints:
        if self.context_size == 1:
            return np.arange(sum(lengths))
        starts = np.cumsum(lengths) - np.asarray(lengths)
        parts = []
        for start, length in zip(starts.tolist(), lengths, strict=True):
            chunk = length // (2 * self.context_size)
            for number in (rank, 2 * self.context_size - 1 - rank):
                parts.append(np.arange(start + number * chunk, start + (number + 1) * chunk))
        return np.concatenate(parts)


@dataclass
class SegmentedSeqParams(PackedSeqParams):  # type: ignore[misc]
    """The borders of the samples, also as the attention of this package takes them."""

    segments: Segments = field(kw_only=True)
    """The whole samples, padding included."""
    layout: Layout = field(kw_only=True)


@dataclass(frozen=True, slots=True)
class Ahead:
    """What is predicted from one token further back for every layer of multi-token prediction."""

    rows_U: torch.Tensor
    """Token of the row at which a response token is predicted."""
    targets_U: torch.Tensor
    slots_U: torch.Tensor
    """Place of each of these among the T."""


@dataclass(frozen=True, slots=True)
class PackedInputs:
    """The arguments of one forward pass, and where its outputs are."""

    tokens_1L: torch.Tensor
    positions_1L: torch.Tensor
    borders: SegmentedSeqParams
    rows_U: torch.Tensor
    """Token of the row whose output predicts each response token that is predicted on this rank."""
    targets_U: torch.Tensor
    slots_U: torch.Tensor
    """Place of each of these among the T."""
    num_targets: int
    """T."""
    tokens_N: torch.Tensor
    """Places in this rank's row of the samples' tokens without padding, end to end."""
    experts_L: torch.Tensor | None
    """[L, layers, experts per token] recorded experts, any where none are recorded; None: the rollout brings none."""
    source: MicroBatch
    ahead: tuple[Ahead, ...] = ()
    """Of each layer of multi-token prediction, where these are trained."""

    @classmethod
    def of(cls, micro_batch: MicroBatch, layout: Layout, layers_ahead: int = 0) -> PackedInputs:
        """``layers_ahead``: layers of multi-token prediction that are trained."""
        device = micro_batch.tokens_P.device
        segments = micro_batch.segments
        assert isinstance(segments, Segments)
        whole_tokens = segments.end_to_end.spread(micro_batch.tokens_P).cpu().numpy()
        lengths = np.asarray(segments.lengths)
        padded = np.asarray(layout.padded(segments.lengths))
        starts, padded_starts = np.cumsum(lengths) - lengths, np.cumsum(padded) - padded
        place_of_token = np.arange(lengths.sum()) + np.repeat(padded_starts - starts, lengths)
        row = np.zeros(int(padded.sum()), np.int64)
        row[place_of_token] = whole_tokens
        positions = np.arange(len(row)) - np.repeat(padded_starts, padded)

        own = layout.own(padded.tolist())
        local = np.full(len(row), -1)
        local[own] = np.arange(len(own))
        responses = np.asarray(micro_batch.layout.lengths)
        ends = padded_starts + lengths
        predictors = np.concatenate([np.arange(end - r, end) - 1 for end, r in zip(ends, responses, strict=True)])
        here = np.flatnonzero(local[predictors] >= 0)
        firsts = np.repeat(padded_starts, responses)

        def tensor(array: Ints) -> torch.Tensor:
            return torch.from_numpy(np.ascontiguousarray(array)).to(device, non_blocking=True)

        return cls(
            tokens_1L=tensor(row[own])[None],
            positions_1L=tensor(positions[own])[None],
            borders=_borders(padded, layout, device),
            rows_U=tensor(local[predictors[here]]),
            targets_U=tensor(row[predictors[here] + 1]),
            slots_U=tensor(here),
            num_targets=len(predictors),
            tokens_N=tensor(local[place_of_token]),
            experts_L=None
            if micro_batch.experts_NLK is None
            else tensor(_row(micro_batch.experts_NLK, place_of_token, len(row))[own]),
            source=micro_batch,
            ahead=tuple(
                Ahead(tensor(local[predictors[own] - depth]), tensor(row[predictors[own] + 1]), tensor(own))
                for depth, own in enumerate(_predicted_ahead(predictors, firsts, local, layers_ahead), start=1)
            ),
        )


def _predicted_ahead(predictors: Ints, firsts: Ints, local: Ints, layers: int) -> Iterator[Ints]:
    """Which response tokens each layer predicts on this rank: those with enough tokens of their sample before them."""
    for depth in range(1, layers + 1):
        sources = predictors - depth
        yield np.flatnonzero((sources >= firsts) & (local[np.maximum(sources, 0)] >= 0))


def _row(experts: Ints, place_of_token: Ints, length: int) -> Ints:
    """Recorded experts of a whole row.  Where nothing is recorded (padding, last tokens), nobody sees the output."""
    row = np.broadcast_to(np.arange(experts.shape[2]), (length, *experts.shape[1:])).copy()
    recorded = (experts >= 0).all(axis=(1, 2))
    row[place_of_token[recorded]] = experts[recorded]
    return row


def _borders(padded: Ints, layout: Layout, device: torch.device) -> SegmentedSeqParams:
    segments = Segments(padded.tolist(), device)
    longest = int(padded.max())
    return SegmentedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=segments.offsets,
        cu_seqlens_kv=segments.offsets,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        segments=segments,
        layout=layout,
    )
