"""Log-probabilities under a head that is too large for its logits to be kept: the vocabulary in blocks, on CPUs.

C = tokens of one chunk, D = hidden size, V = vocabulary, B = tokens of the vocabulary in one block.

A block of logits lives in one buffer, which all blocks of all chunks take in turn.  Cutting the vocabulary rather than
the tokens, every part of the head is read, and every part of its gradient written, once per chunk of many tokens.  The
backward pass computes logits again, but those that the forward pass left in the buffer.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

# Tokens of a chunk, and logits of a block (at most 96 MiB of fp32).
_CHUNK_TOKENS = 1024
_BLOCK_NUMEL = 3 * 2**23
# Rows of logits begin where cache lines do: a product into others takes half as long again.
_ALIGNMENT = 64


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
    # A gradient of entropies needs a second tensor of a block's size.
    numel = _BLOCK_NUMEL // 2 if with_entropy else _BLOCK_NUMEL
    count = -(-len(weight_VD) * min(len(hidden_TD), _CHUNK_TOKENS) // numel)
    width = -(-len(weight_VD) // count)
    blocks = _slices(len(weight_VD), width + -width % _ALIGNMENT)
    plan = _Plan(_slices(len(hidden_TD), _CHUNK_TOKENS), blocks)
    head = _Head(weight_VD, bias_V, temperature, torch.promote_types(hidden_TD.dtype, torch.float32))
    scores: tuple[torch.Tensor, torch.Tensor | None] = _BlockedLogProbs.apply(
        hidden_TD, weight_VD, bias_V, target_T, head, plan, with_entropy
    )
    return scores


def _slices(length: int, width: int) -> list[slice]:
    return [slice(start, min(start + width, length)) for start in range(0, length, width)]


@dataclass(frozen=True, slots=True)
class _Plan:
    chunks: list[slice]
    """Of the tokens."""
    blocks: list[slice]
    """Of the vocabulary."""

    def buffer(self, like: torch.Tensor) -> torch.Tensor:
        """For the logits of any block of any chunk."""
        return like.new_empty(_width(self.chunks[0]) * _width(self.blocks[0]))


def _width(of: slice) -> int:
    return int(of.stop - of.start)


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

    def logits(self, scaled_CD: torch.Tensor, block: slice, buffer: torch.Tensor) -> torch.Tensor:
        """[C, B], in ``buffer``."""
        logits_CB = _view(buffer, len(scaled_CD), block)
        torch.mm(scaled_CD, self.weight(block).T, out=logits_CB)
        if self.bias_V is not None:
            logits_CB += self.bias_V[block] / self.temperature
        return logits_CB


def _view(buffer: torch.Tensor, num_tokens: int, block: slice) -> torch.Tensor:
    """[C, B] of ``buffer``."""
    return buffer[: num_tokens * _width(block)].view(num_tokens, -1)


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
        buffer = plan.buffer(scaled_TD)
        parts = []
        for rows in plan.chunks:
            sums = _Sums(target_T[rows], head.dtype, with_entropy)
            for block in plan.blocks:
                sums.add(head.logits(scaled_TD[rows], block, buffer), block)
            parts.append(sums)
        normalizer_T = torch.cat([sums.normalizer() for sums in parts])
        entropy_T = torch.cat([sums.entropy() for sums in parts]) if with_entropy else None
        ctx.save_for_backward(hidden_TD, weight_VD, bias_V, target_T, normalizer_T, entropy_T)
        ctx.head, ctx.plan = head, plan
        ctx.left = None
        if any(ctx.needs_input_grad) and not with_entropy:
            ctx.left = _LeftOver(buffer, parts[-1].max_C)
        return torch.cat([sums.logit_C for sums in parts]).sub_(normalizer_T), entropy_T

    @staticmethod
    def backward(
        ctx: Any, grad_logp_T: torch.Tensor | None, grad_entropy_T: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        hidden_TD, weight_VD, bias_V, target_T, normalizer_T, entropy_T = ctx.saved_tensors
        plan: _Plan = ctx.plan
        head = replace(ctx.head, weight_VD=weight_VD, bias_V=bias_V)
        if grad_logp_T is None:
            grad_logp_T = torch.zeros_like(normalizer_T)
        left, ctx.left = ctx.left, None
        scaled_TD = head.scaled(hidden_TD)
        buffer = plan.buffer(scaled_TD) if left is None else left.buffer
        grads = _Gradients(head, scaled_TD, ctx.needs_input_grad[:3])
        for rows in reversed(plan.chunks):
            scale_C = grad_logp_T[rows]
            for block in reversed(plan.blocks):
                if left is not None and grad_entropy_T is None:
                    delta_CB = left.probabilities(normalizer_T[rows], block)
                else:
                    delta_CB = head.logits(scaled_TD[rows], block, buffer).sub_(normalizer_T[rows, None])
                    if grad_entropy_T is None:
                        delta_CB.exp_()
                left = None
                if grad_entropy_T is None:
                    _add_at_targets(delta_CB, target_T[rows], block, -torch.ones_like(scale_C))
                    grads.add(rows, block, delta_CB, -scale_C)
                else:
                    _entropy_delta(delta_CB, scale_C, entropy_T[rows], grad_entropy_T[rows])
                    _add_at_targets(delta_CB, target_T[rows], block, scale_C)
                    grads.add(rows, block, delta_CB, torch.ones_like(scale_C))
        return *grads.result(), None, None, None, None


@dataclass(frozen=True, slots=True)
class _LeftOver:
    """What the forward pass leaves behind: exponentials of the last block's logits above the largest logit so far."""

    buffer: torch.Tensor
    max_C: torch.Tensor

    def probabilities(self, normalizer_C: torch.Tensor, block: slice) -> torch.Tensor:
        """[C, B], in place of the exponentials."""
        return _view(self.buffer, len(self.max_C), block).mul_((self.max_C - normalizer_C).exp_()[:, None])


class _Sums:
    """Sums over the vocabulary for the tokens of a chunk, block by block; terms are relative to the largest logit."""

    def __init__(self, target_C: torch.Tensor, dtype: torch.dtype, with_entropy: bool) -> None:
        self._target_C = target_C
        self._with_entropy = with_entropy
        self.max_C = torch.full(target_C.shape, -torch.inf, dtype=dtype, device=target_C.device)
        self.logit_C = torch.zeros_like(self.max_C)
        """Of the target."""
        self._sum_C = torch.zeros_like(self.max_C)
        self._weighted_C = torch.zeros_like(self.max_C)
        """Of every term times its distance from the largest logit."""

    def add(self, logits_CB: torch.Tensor, block: slice) -> None:
        """Take in a block.  Its logits become exponentials, or nothing of use where entropy is asked for."""
        column_C, here_C = _columns(self._target_C, block)
        self.logit_C += logits_CB.gather(1, column_C[:, None]).squeeze(1).masked_fill_(~here_C, 0.0)
        before_C, self.max_C = self.max_C, torch.maximum(self.max_C, logits_CB.amax(-1))
        lower_C = torch.where(before_C.isinf(), 0.0, before_C - self.max_C)
        logits_CB.sub_(self.max_C[:, None]).exp_()
        own_C = logits_CB.sum(-1)
        if self._with_entropy:
            own_weighted_C = torch.special.entr(logits_CB, out=logits_CB).sum(-1)
            self._weighted_C = (self._weighted_C - lower_C * self._sum_C) * lower_C.exp() + own_weighted_C
        self._sum_C = self._sum_C * lower_C.exp() + own_C

    def normalizer(self) -> torch.Tensor:
        """[C] log of the sum of exponentials."""
        return self.max_C + self._sum_C.log()

    def entropy(self) -> torch.Tensor:
        """[C], in nats."""
        return self._sum_C.log() + self._weighted_C / self._sum_C


def _columns(target_C: torch.Tensor, block: slice) -> tuple[torch.Tensor, torch.Tensor]:
    """The block's column of each target, and whether it has one."""
    here_C = (target_C >= block.start) & (target_C < block.stop)
    return torch.where(here_C, target_C - block.start, 0), here_C


def _add_at_targets(x_CB: torch.Tensor, target_C: torch.Tensor, block: slice, value_C: torch.Tensor) -> None:
    column_C, here_C = _columns(target_C, block)
    x_CB.scatter_add_(1, column_C[:, None], value_C.masked_fill(~here_C, 0.0)[:, None])


def _entropy_delta(
    log_softmax_CB: torch.Tensor, grad_logp_C: torch.Tensor, entropy_C: torch.Tensor, grad_entropy_C: torch.Tensor
) -> None:
    """Put in its place the gradient of both outputs, without what ``logp`` gives to the target itself."""
    p_CB = log_softmax_CB.exp()
    log_softmax_CB.add_(entropy_C[:, None]).mul_(-grad_entropy_C[:, None]).sub_(grad_logp_C[:, None]).mul_(p_CB)


class _Gradients:
    """Of hidden states, weight and bias, gathered over blocks and chunks."""

    def __init__(self, head: _Head, scaled_TD: torch.Tensor, needed: tuple[bool, bool, bool]) -> None:
        self._head, self._scaled_TD = head, scaled_TD
        self._hidden_TD = torch.zeros_like(scaled_TD) if needed[0] else None
        # Its pages are written, or cleared, by the first block that comes by.
        self._weight_VD = torch.empty_like(head.weight_VD, dtype=head.dtype) if needed[1] else None
        self._bias_V = None
        if needed[2] and head.bias_V is not None:
            self._bias_V = torch.zeros_like(head.bias_V, dtype=head.dtype)
        self._last = len(scaled_TD)

    def add(self, rows: slice, block: slice, delta_CB: torch.Tensor, scale_C: torch.Tensor) -> None:
        """Add tokens whose gradient with respect to their logits is ``scale * delta``.  The last chunk comes first."""
        if self._hidden_TD is not None:
            part_CD = self._hidden_TD[rows]
            part_CD.add_((delta_CB @ self._head.weight(block)).mul_(scale_C[:, None]))
        if self._weight_VD is not None:
            scaled_CD = self._scaled_TD[rows] * scale_C[:, None]
            if rows.stop == self._last:
                torch.mm(delta_CB.T, scaled_CD, out=self._weight_VD[block])
            else:
                self._weight_VD[block].addmm_(delta_CB.T, scaled_CD)
        if self._bias_V is not None:
            self._bias_V[block] += (scale_C / self._head.temperature) @ delta_CB

    def result(self) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """In the order of the inputs; autograd casts them to the inputs' dtypes."""
        if self._hidden_TD is not None and self._head.temperature != 1.0:
            self._hidden_TD /= self._head.temperature
        return self._hidden_TD, self._weight_VD, self._bias_V
