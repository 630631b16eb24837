"""Log-probabilities under a head that is too large for its logits to be kept: the vocabulary in blocks, on CPUs.

C = tokens of one chunk, D = hidden size, V = vocabulary, B = tokens of the vocabulary in one block, N = blocks.

A block is a distribution of its own, the softmax over its logits; by the sums of their exponentials, blocks mix into
the distribution of the whole vocabulary.  The backward pass computes blocks again, but those that the forward pass
keeps, and without tokens whose gradient is zero.  Cutting the vocabulary rather than the tokens, every part of the head
is read, and every part of its gradient written, once per chunk of many tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

# Tokens of a chunk, and logits of a block (10 MiB of fp32): enough for products at full speed, and what a softmax still
# finds in the cache.  With 1,024 tokens a block has 2,560 columns; rows a power of two apart would share cache sets.
_CHUNK_TOKENS = 1024
_BLOCK_NUMEL = 2560 * 1024
# Probabilities that are kept rather than computed again: 72 MiB of fp32.
_KEPT_NUMEL = 9 * 2**21
# Rows of logits begin where cache lines do: a product into others takes half as long again.
_ALIGNMENT = 64

_Delta = tuple[slice, torch.Tensor]
"""Columns of the logits, and [C, B] a gradient with respect to them."""


def linear_logprobs_in_blocks(
    hidden_TD: torch.Tensor,
    weight_VD: torch.Tensor,
    bias_V: torch.Tensor | None,
    target_T: torch.Tensor,
    temperature: float,
    *,
    with_entropy: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """[T] log-probability of each target and, where asked for, entropy; in fp32 (fp64 for fp64 inputs)."""
    chunks = _slices(len(hidden_TD), _CHUNK_TOKENS)
    width = max(1, _BLOCK_NUMEL // _width(chunks[0]))
    blocks = _slices(len(weight_VD), width + -width % _ALIGNMENT)
    plan = _Plan(chunks, blocks, _KEPT_NUMEL // (_width(chunks[-1]) * _width(blocks[0])))
    head = _Head(weight_VD, bias_V, temperature, torch.promote_types(hidden_TD.dtype, torch.float32))
    scores: tuple[torch.Tensor, torch.Tensor | None] = _BlockedLogProbs.apply(
        hidden_TD, weight_VD, bias_V, target_T, head, plan, with_entropy
    )
    return scores


def _slices(length: int, width: int) -> list[slice]:
    return [slice(start, min(start + width, length)) for start in range(0, length, width)]


def _width(of: slice) -> int:
    return int(of.stop - of.start)


@dataclass(frozen=True, slots=True)
class _Plan:
    chunks: list[slice]
    """Of the tokens."""
    blocks: list[slice]
    """Of the vocabulary."""
    num_kept: int
    """Blocks at the end of the last chunk whose probabilities are kept."""

    def keeps(self, rows: slice, number: int) -> bool:
        """Whether this block of this chunk is one of them."""
        return rows == self.chunks[-1] and number >= len(self.blocks) - self.num_kept


@dataclass(frozen=True, slots=True)
class _Head:
    weight_VD: torch.Tensor
    bias_V: torch.Tensor | None
    temperature: float
    dtype: torch.dtype
    """Of logits and sums."""

    def weight(self, block: slice) -> torch.Tensor:
        """[B, D]."""
        return self.weight_VD[block].to(self.dtype)

    def scaled(self, hidden_TD: torch.Tensor) -> torch.Tensor:
        """Hidden states that give logits divided by the temperature."""
        return hidden_TD.to(self.dtype) if self.temperature == 1.0 else hidden_TD.to(self.dtype) / self.temperature

    def logits(self, scaled_CD: torch.Tensor, block: slice) -> torch.Tensor:
        """[C, B], in new memory."""
        logits_CB = _times_transposed(scaled_CD, self.weight(block))
        if self.bias_V is not None:
            logits_CB += self.bias_V[block] / self.temperature
        return logits_CB


def _times_transposed(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """``a @ b.T``; in fp32 by oneDNN, in up to a tenth less time than by what torch takes otherwise."""
    if a.dtype == torch.float32 and torch.backends.mkldnn.is_available():
        product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
        return product
    return a @ b.T


class _BlockedLogProbs(torch.autograd.Function):  # type: ignore[misc]
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: torch.Tensor,
        weight_VD: torch.Tensor,
        bias_V: torch.Tensor | None,
        target_T: torch.Tensor,
        head: _Head,
        plan: _Plan,
        with_entropy: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        ctx.set_materialize_grads(False)
        scaled_TD = head.scaled(hidden_TD)
        mixtures, kept = [], []
        for rows in plan.chunks:
            mixture = _Mixture(target_T[rows], head.dtype, with_entropy)
            for number, block in enumerate(plan.blocks):
                p_CB = mixture.add(head.logits(scaled_TD[rows], block), block)
                if any(ctx.needs_input_grad) and plan.keeps(rows, number):
                    kept.append(p_CB)
            mixtures.append(mixture)
        log_sum_NT = torch.cat([torch.stack(mixture.log_sums) for mixture in mixtures], 1)
        entropy_T = torch.cat([mixture.entropy() for mixture in mixtures]) if with_entropy else None
        ctx.save_for_backward(hidden_TD, weight_VD, bias_V, target_T, log_sum_NT, entropy_T)
        ctx.head, ctx.plan, ctx.kept = head, plan, kept
        return torch.cat([mixture.logit_C for mixture in mixtures]).sub_(log_sum_NT.logsumexp(0)), entropy_T

    @staticmethod
    def backward(
        ctx: Any, grad_logp_T: torch.Tensor | None, grad_entropy_T: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        hidden_TD, weight_VD, bias_V, target_T, log_sum_NT, entropy_T = ctx.saved_tensors
        head: _Head = replace(ctx.head, weight_VD=weight_VD, bias_V=bias_V)
        kept, ctx.kept = ctx.kept, []
        log_share_NT = log_sum_NT - log_sum_NT.logsumexp(0)
        if grad_logp_T is None:
            grad_logp_T = torch.zeros_like(log_sum_NT[0])
        grads = _Gradients(head, hidden_TD, ctx.needs_input_grad[:3])
        for rows in reversed(ctx.plan.chunks):
            token_C = _with_gradient(rows, grad_logp_T, grad_entropy_T)
            if len(token_C) == 0:
                kept = []
                continue
            chunk = _Chunk(head.scaled(hidden_TD[token_C]), target_T[token_C], log_share_NT[:, token_C])
            grad_logp_C = grad_logp_T[token_C]
            if grad_entropy_T is None:
                deltas = chunk.deltas(head, ctx.plan.blocks, kept, token_C - rows.start)
                grads.add(token_C, chunk.scaled_CD, -grad_logp_C, deltas)
            else:
                kept = []
                of_entropy = entropy_T[token_C], grad_entropy_T[token_C]
                deltas = chunk.entropy_deltas(head, ctx.plan.blocks, grad_logp_C, *of_entropy)
                grads.add(token_C, chunk.scaled_CD, torch.ones_like(grad_logp_C), deltas)
        return *grads.result(), None, None, None, None


def _with_gradient(rows: slice, *grads: torch.Tensor | None) -> torch.Tensor:
    """[C] the tokens of ``rows`` that have one: where a group has no advantage or the ratio is clipped, it is zero."""
    parts = [grad_T[rows] for grad_T in grads if grad_T is not None]
    return torch.stack(parts).any(0).nonzero().squeeze(1) + rows.start


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Tokens in the backward pass."""

    scaled_CD: torch.Tensor
    target_C: torch.Tensor
    log_share_NC: torch.Tensor
    """Logarithm of each block's share in the distribution."""

    def deltas(
        self, head: _Head, blocks: list[slice], kept: list[torch.Tensor], row_C: torch.Tensor
    ) -> Iterator[_Delta]:
        """Minus the gradient of ``logp`` with respect to the logits; the last block first.

        Uses up the blocks that were ``kept``, in which these tokens have the rows ``row_C``.
        """
        for number, block in reversed(list(enumerate(blocks))):
            if kept:
                delta_CB = kept.pop()[row_C]
            else:
                logits_CB = head.logits(self.scaled_CD, block)
                delta_CB = torch.softmax(logits_CB, -1, out=logits_CB)
            delta_CB.mul_(self.log_share_NC[number, :, None].exp())
            _add_at_targets(delta_CB, self.target_C, block, -torch.ones_like(self.scaled_CD[:, 0]))
            yield block, delta_CB

    def entropy_deltas(
        self,
        head: _Head,
        blocks: list[slice],
        grad_logp_C: torch.Tensor,
        entropy_C: torch.Tensor,
        grad_entropy_C: torch.Tensor,
    ) -> Iterator[_Delta]:
        """Gradient of both outputs with respect to the logits; the last block first."""
        for number, block in reversed(list(enumerate(blocks))):
            delta_CB = head.logits(self.scaled_CD, block)
            torch.log_softmax(delta_CB, -1, out=delta_CB).add_(self.log_share_NC[number, :, None])
            _entropy_delta(delta_CB, grad_logp_C, entropy_C, grad_entropy_C)
            _add_at_targets(delta_CB, self.target_C, block, grad_logp_C)
            yield block, delta_CB


class _Mixture:
    """The distribution of a chunk's tokens as a mixture of those over each block."""

    def __init__(self, target_C: torch.Tensor, dtype: torch.dtype, with_entropy: bool) -> None:
        self._target_C = target_C
        self._with_entropy = with_entropy
        self.logit_C = torch.zeros(target_C.shape, dtype=dtype, device=target_C.device)
        """Of the target."""
        self.log_sums: list[torch.Tensor] = []
        """[C] logarithm of the sum of exponentials of each block."""
        self._entropies: list[torch.Tensor] = []
        """[C] of each block."""

    def add(self, logits_CB: torch.Tensor, block: slice) -> torch.Tensor:
        """Take in a block, and its memory: [C, B] the probabilities within it."""
        column_C, here_C = _columns(self._target_C, block)
        self.logit_C += logits_CB.gather(1, column_C[:, None]).squeeze(1).masked_fill_(~here_C, 0.0)
        max_C = logits_CB.amax(-1)
        if self._with_entropy:
            logits_CB.sub_(max_C[:, None])
            p_CB = logits_CB.softmax(-1)
        else:
            p_CB = torch.softmax(logits_CB, -1, out=logits_CB)
        # The largest probability is one over the sum of exponentials above the largest logit.
        log_sum_C = -p_CB.amax(-1).log()
        if self._with_entropy:
            self._entropies.append(log_sum_C - logits_CB.mul_(p_CB).sum(-1))
        self.log_sums.append(max_C + log_sum_C)
        return p_CB

    def entropy(self) -> torch.Tensor:
        """[C], in nats: that of the blocks, and that of the choice among them."""
        log_sum_NC = torch.stack(self.log_sums)
        log_share_NC = log_sum_NC - log_sum_NC.logsumexp(0)
        return (log_share_NC.exp() * (torch.stack(self._entropies) - log_share_NC)).sum(0)


def _columns(target_C: torch.Tensor, block: slice) -> tuple[torch.Tensor, torch.Tensor]:
    """The block's column of each target, and whether it has one."""
    here_C = (target_C >= block.start) & (target_C < block.stop)
    return torch.where(here_C, target_C - block.start, 0), here_C


def _add_at_targets(x_CB: torch.Tensor, target_C: torch.Tensor, block: slice, value_C: torch.Tensor) -> None:
    column_C, here_C = _columns(target_C, block)
    x_CB.scatter_add_(1, column_C[:, None], value_C.masked_fill(~here_C, 0.0)[:, None])


def _entropy_delta(
    log_p_CB: torch.Tensor, grad_logp_C: torch.Tensor, entropy_C: torch.Tensor, grad_entropy_C: torch.Tensor
) -> None:
    """Put in its place the gradient of both outputs, without what ``logp`` gives to the target itself."""
    p_CB = log_p_CB.exp()
    log_p_CB.add_(entropy_C[:, None]).mul_(-grad_entropy_C[:, None]).sub_(grad_logp_C[:, None]).mul_(p_CB)


class _Gradients:
    """Of hidden states, weight and bias, gathered over blocks and chunks."""

    def __init__(self, head: _Head, hidden_TD: torch.Tensor, needed: tuple[bool, bool, bool]) -> None:
        self._head = head
        self._hidden_TD = torch.zeros_like(hidden_TD, dtype=head.dtype) if needed[0] else None
        # Its pages are written, or cleared, by the first chunk that comes by.
        self._weight_VD = torch.empty_like(head.weight_VD, dtype=head.dtype) if needed[1] else None
        self._written = False
        self._bias_V = None
        if needed[2] and head.bias_V is not None:
            self._bias_V = torch.zeros_like(head.bias_V, dtype=head.dtype)

    def add(
        self, token_C: torch.Tensor, scaled_CD: torch.Tensor, scale_C: torch.Tensor, deltas: Iterator[_Delta]
    ) -> None:
        """Add tokens whose gradient with respect to their logits is ``scale * delta``.

        The scale multiplies [C, D] rather than [C, B], which mostly is the larger.
        """
        weighted_CD = scaled_CD * scale_C[:, None]
        sum_CD = torch.zeros_like(scaled_CD)
        for block, delta_CB in deltas:
            if self._hidden_TD is not None:
                sum_CD += _times_transposed(delta_CB, self._head.weight(block).T)
            if self._weight_VD is not None:
                self._add_to_weight(block, delta_CB, weighted_CD)
            if self._bias_V is not None:
                self._bias_V[block] += (scale_C / self._head.temperature) @ delta_CB
        if self._hidden_TD is not None:
            self._hidden_TD[token_C] = sum_CD.mul_((scale_C / self._head.temperature)[:, None])
        self._written = True

    def _add_to_weight(self, block: slice, delta_CB: torch.Tensor, weighted_CD: torch.Tensor) -> None:
        assert self._weight_VD is not None
        part_BD = self._weight_VD[block]
        if self._written:
            part_BD.addmm_(delta_CB.T, weighted_CD)
        else:
            torch.mm(delta_CB.T, weighted_CD, out=part_BD)

    def result(self) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """In the order of the inputs; autograd casts them to the inputs' dtypes."""
        if self._weight_VD is not None and not self._written:
            self._weight_VD.zero_()
        return self._hidden_TD, self._weight_VD, self._bias_V
