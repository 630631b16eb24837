"""Log-probabilities and entropies of given tokens, without the logits of a whole micro-batch.

T = tokens, C = tokens of one chunk, D = hidden size, V = vocabulary, or the part of it that this rank holds.

The distribution is ``softmax((hidden @ weight.T + bias) / temperature)``, before any top-p or top-k truncation.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch

from miles.core.math.blocked_logprobs import linear_logprobs_in_blocks

# How many logits one chunk holds: what stays in a CPU's cache, and what keeps an accelerator busy (512 MiB of fp32).
_CPU_CHUNK_NUMEL = 2**20
_ACCELERATOR_CHUNK_NUMEL = 2**27
# With fewer tokens, the product with the head waits for memory.
_MIN_CHUNK_TOKENS = 128
# How many logits are kept rather than computed again: 128 MiB of fp32 on a CPU, 512 MiB on an accelerator.
_CPU_KEPT_NUMEL = 2**25
_ACCELERATOR_KEPT_NUMEL = 2**27


class LogProbs(NamedTuple):
    """Of given tokens: natural-log probability, and, when asked for, entropy of their distribution in nats."""

    logp_T: torch.Tensor
    entropy_T: torch.Tensor | None = None


class VocabularyShard(Protocol):
    """A head whose rows are divided among tensor-parallel ranks, seen from one of them.

    Both methods are collective, work in place, and give every rank the same result.
    """

    first: int
    """Token id of this rank's first row."""

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """``x`` summed over the ranks."""

    def max(self, x: torch.Tensor) -> torch.Tensor:
        """The elementwise largest ``x`` of the ranks."""


def token_logprobs(
    logits_TV: torch.Tensor, target_T: torch.Tensor, *, temperature: float = 1.0, with_entropy: bool = False
) -> LogProbs:
    """Log-probabilities of ``target_T`` from logits, in fp32 (fp64 for fp64 logits)."""
    _check_temperature(temperature)
    log_softmax_TV = (logits_TV.to(_compute_dtype(logits_TV)) / temperature).log_softmax(-1)
    logp_T = log_softmax_TV.gather(-1, target_T[:, None]).squeeze(-1)
    return LogProbs(logp_T, _entropy(log_softmax_TV) if with_entropy else None)


def linear_logprobs(
    hidden_TD: torch.Tensor,
    weight_VD: torch.Tensor,
    target_T: torch.Tensor,
    *,
    bias_V: torch.Tensor | None = None,
    temperature: float = 1.0,
    with_entropy: bool = False,
    chunk_size: int | None = None,
    shard: VocabularyShard | None = None,
) -> LogProbs:
    """Log-probabilities of ``target_T`` under the language-model head, ``chunk_size`` tokens at a time.

    Neither the forward nor the backward pass holds more logits than those of one chunk: the backward pass computes
    them again.  Only what fits one chunk is kept instead.  ``chunk_size`` None: the fastest way.  The logits of all
    tokens are kept where they fit a small budget of memory; else chunks are of the fastest size, or, on CPUs, it is
    the vocabulary that is cut (``blocked_logprobs``).

    Results are in fp32 (fp64 for fp64 inputs), and so are logits, softmax and the sum of the head's gradient over
    chunks, whatever the dtype of hidden states and head.

    With a ``shard``, ``weight_VD`` and ``bias_V`` are this rank's rows (at least one; leave out rows that only pad the
    vocabulary), ``hidden_TD`` and ``target_T`` are the same on all of its ranks, and so are the results; the gradient
    of ``hidden_TD`` is complete, that of weight and bias is this rank's.  Collective then.
    """
    _check_temperature(temperature)
    num_tokens, vocabulary = len(hidden_TD), len(weight_VD)
    if chunk_size is None:
        on_cpu = hidden_TD.device.type == "cpu"
        chunk_numel = _CPU_CHUNK_NUMEL if on_cpu else _ACCELERATOR_CHUNK_NUMEL
        chunk_size = max(chunk_numel // vocabulary, _MIN_CHUNK_TOKENS)
        keep = num_tokens * vocabulary <= (_CPU_KEPT_NUMEL if on_cpu else _ACCELERATOR_KEPT_NUMEL)
        if on_cpu and not keep and shard is None:
            return LogProbs(
                *linear_logprobs_in_blocks(
                    hidden_TD, weight_VD, bias_V, target_T, temperature, with_entropy=with_entropy
                )
            )
    else:
        keep = num_tokens <= chunk_size
    plan = _Plan(tuple(_chunks(num_tokens, chunk_size)), keep, temperature, with_entropy, shard)
    return LogProbs(*_LinearLogProbs.apply(hidden_TD, weight_VD, bias_V, target_T, plan))


@dataclass(frozen=True, slots=True)
class _Plan:
    chunks: tuple[slice, ...]
    keep: bool
    """Whether the backward pass finds the log-softmax of every chunk instead of computing it again."""
    temperature: float
    with_entropy: bool
    shard: VocabularyShard | None


def _check_temperature(temperature: float) -> None:
    if temperature <= 0.0:
        raise ValueError(f"the temperature is {temperature}; log-probabilities need a positive one")


def _compute_dtype(x: torch.Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _entropy(log_softmax_TV: torch.Tensor) -> torch.Tensor:
    return -(log_softmax_TV.exp() * log_softmax_TV).sum(-1)


class _LinearLogProbs(torch.autograd.Function):  # type: ignore[misc]
    """Forward and backward of ``linear_logprobs``."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: torch.Tensor,
        weight_VD: torch.Tensor,
        bias_V: torch.Tensor | None,
        target_T: torch.Tensor,
        plan: _Plan,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        ctx.set_materialize_grads(False)
        head = _head(hidden_TD, weight_VD, bias_V, plan)
        logp_T = hidden_TD.new_empty(len(hidden_TD), dtype=head.dtype)
        entropy_T = torch.empty_like(logp_T) if plan.with_entropy else None
        keep = plan.keep and any(ctx.needs_input_grad)
        kept = []
        for rows in plan.chunks:
            log_softmax_CV = head.log_softmax(rows)
            logp_T[rows] = head.of_targets(log_softmax_CV, target_T[rows])
            if entropy_T is not None:
                entropy_T[rows] = _entropy(log_softmax_CV)
            if keep:
                kept.append(log_softmax_CV)
        for result_T in (logp_T, entropy_T):
            if result_T is not None and plan.shard is not None:
                plan.shard.sum(result_T)
        ctx.save_for_backward(hidden_TD, weight_VD, bias_V, target_T, entropy_T, head.normalizer_2T, *kept)
        ctx.plan = plan
        return logp_T, entropy_T

    @staticmethod
    def backward(
        ctx: Any, grad_logp_T: torch.Tensor | None, grad_entropy_T: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        hidden_TD, weight_VD, bias_V, target_T, entropy_T, normalizer_2T, *kept = ctx.saved_tensors
        head = _head(hidden_TD, weight_VD, bias_V, ctx.plan, normalizer_2T)
        if grad_logp_T is None:
            grad_logp_T = torch.zeros(len(hidden_TD), dtype=head.dtype, device=hidden_TD.device)
        grads = _HeadGradients(head, ctx.needs_input_grad[:3])
        for number, rows in enumerate(ctx.plan.chunks):
            log_softmax_CV = kept[number] if kept else head.log_softmax(rows)
            target_C, grad_logp_C = target_T[rows], grad_logp_T[rows]
            if grad_entropy_T is None:
                p_CV = log_softmax_CV.exp() if kept else log_softmax_CV.exp_()
                delta_CV = head.add_at_targets(p_CV, target_C, -torch.ones_like(grad_logp_C))
                grads.add(rows, delta_CV, -grad_logp_C)
            else:
                delta_CV = _entropy_delta(log_softmax_CV, grad_logp_C, entropy_T[rows], grad_entropy_T[rows])
                head.add_at_targets(delta_CV, target_C, grad_logp_C)
                grads.add(rows, delta_CV, torch.ones_like(grad_logp_C))
        return *grads.result(ctx.plan.shard), None, None


def _chunks(num_tokens: int, chunk_size: int) -> Iterator[slice]:
    for start in range(0, num_tokens, chunk_size):
        yield slice(start, min(start + chunk_size, num_tokens))


def _entropy_delta(
    log_softmax_CV: torch.Tensor, grad_logp_C: torch.Tensor, entropy_C: torch.Tensor, grad_entropy_C: torch.Tensor
) -> torch.Tensor:
    """Gradient of both outputs with respect to the logits, without what ``logp`` gives to the target itself.

    ``dH / d logits = -p (log p + H)`` and ``d logp / d logits = onehot(target) - p``.
    """
    delta_CV = (log_softmax_CV + entropy_C[:, None]).mul_(-grad_entropy_C[:, None]).sub_(grad_logp_C[:, None])
    return delta_CV.mul_(log_softmax_CV.exp())


class _Head:
    """Log-softmax of a language-model head, for a slice of the tokens at a time."""

    normalizer_2T: torch.Tensor | None = None
    """Largest logit, and log of the sum of exponentials above it, where they are not this rank's alone to know."""

    def __init__(
        self, hidden_TD: torch.Tensor, weight_VD: torch.Tensor, bias_V: torch.Tensor | None, temperature: float
    ) -> None:
        self.dtype = _compute_dtype(hidden_TD)
        # An accelerator multiplies half-precision numbers into fp32; a CPU has to widen them first.
        in_dtype = hidden_TD.dtype if hidden_TD.is_cuda else self.dtype
        self.hidden_TD, self.weight_VD = hidden_TD.to(in_dtype), weight_VD.to(in_dtype)
        self.bias_V = bias_V
        self.temperature = temperature

    def log_softmax(self, rows: slice) -> torch.Tensor:
        """[C, V], in at least fp32."""
        logits_CV = self._logits(rows)
        if logits_CV.device.type != "cpu":
            return logits_CV.log_softmax(-1)
        # In place: a second tensor of that size would cost more time, for its pages, than the softmax itself.
        return torch.log_softmax(logits_CV, -1, out=logits_CV)

    def of_targets(self, x_CV: torch.Tensor, target_C: torch.Tensor) -> torch.Tensor:
        """[C]: the column of each row's target."""
        return x_CV.gather(1, target_C[:, None]).squeeze(1)

    def add_at_targets(self, x_CV: torch.Tensor, target_C: torch.Tensor, value_C: torch.Tensor) -> torch.Tensor:
        """Add to the column of each row's target, in place."""
        return x_CV.scatter_add_(1, target_C[:, None], value_C[:, None])

    def matmul(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """``a @ b`` with sums and result in at least fp32."""
        if b.dtype == self.dtype:
            return a @ b
        return torch.mm(a.to(b.dtype), b, out_dtype=self.dtype)

    def _logits(self, rows: slice) -> torch.Tensor:
        logits_CV = self.matmul(self.hidden_TD[rows], self.weight_VD.T)
        if self.bias_V is not None:
            logits_CV += self.bias_V
        if self.temperature != 1.0:
            logits_CV /= self.temperature
        return logits_CV


class _ShardedHead(_Head):
    """The same with this rank's columns of [C, V].  The backward pass finds the normalizer."""

    def __init__(
        self,
        hidden_TD: torch.Tensor,
        weight_VD: torch.Tensor,
        bias_V: torch.Tensor | None,
        temperature: float,
        shard: VocabularyShard,
        normalizer_2T: torch.Tensor | None,
    ) -> None:
        super().__init__(hidden_TD, weight_VD, bias_V, temperature)
        self._shard = shard
        self._agreed = normalizer_2T is not None
        if normalizer_2T is None:
            normalizer_2T = hidden_TD.new_empty(2, len(hidden_TD), dtype=self.dtype)
        self.normalizer_2T = normalizer_2T

    def log_softmax(self, rows: slice) -> torch.Tensor:
        assert self.normalizer_2T is not None
        logits_CV = self._logits(rows)
        max_C, log_sum_C = self.normalizer_2T[:, rows]
        if not self._agreed:
            max_C.copy_(self._shard.max(logits_CV.amax(-1)))
        logits_CV.sub_(max_C[:, None])
        if not self._agreed:
            log_sum_C.copy_(self._shard.sum(logits_CV.exp().sum(-1)).log())
        return logits_CV.sub_(log_sum_C[:, None])

    def of_targets(self, x_CV: torch.Tensor, target_C: torch.Tensor) -> torch.Tensor:
        """0 where the target is another rank's."""
        column_C, elsewhere_C = self._columns(target_C)
        return super().of_targets(x_CV, column_C).masked_fill_(elsewhere_C, 0.0)

    def add_at_targets(self, x_CV: torch.Tensor, target_C: torch.Tensor, value_C: torch.Tensor) -> torch.Tensor:
        column_C, elsewhere_C = self._columns(target_C)
        return super().add_at_targets(x_CV, column_C, value_C.masked_fill(elsewhere_C, 0.0))

    def _columns(self, target_C: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """This rank's column of each target, and where it has none."""
        column_C = target_C - self._shard.first
        last = len(self.weight_VD) - 1
        return column_C.clamp(0, last), (column_C < 0) | (column_C > last)


def _head(
    hidden_TD: torch.Tensor,
    weight_VD: torch.Tensor,
    bias_V: torch.Tensor | None,
    plan: _Plan,
    normalizer_2T: torch.Tensor | None = None,
) -> _Head:
    if plan.shard is None:
        return _Head(hidden_TD, weight_VD, bias_V, plan.temperature)
    return _ShardedHead(hidden_TD, weight_VD, bias_V, plan.temperature, plan.shard, normalizer_2T)


class _HeadGradients:
    """Gradients of hidden states, weight and bias, gathered chunk by chunk."""

    def __init__(self, head: _Head, needed: tuple[bool, bool, bool]) -> None:
        self.head = head
        self.hidden_TD = torch.empty_like(head.hidden_TD, dtype=head.dtype) if needed[0] else None
        self.weight_VD = torch.zeros_like(head.weight_VD, dtype=head.dtype) if needed[1] else None
        self.bias_V = None
        if needed[2] and head.bias_V is not None:
            self.bias_V = torch.zeros_like(head.bias_V, dtype=head.dtype)

    def add(self, rows: slice, delta_CV: torch.Tensor, scale_C: torch.Tensor) -> None:
        """Add tokens whose gradient with respect to their logits, times the temperature, is ``scale * delta``.

        The scale multiplies [C, D] rather than [C, V], which mostly is the larger.
        """
        head = self.head
        scale_C = scale_C / head.temperature
        if self.hidden_TD is not None:
            self.hidden_TD[rows] = head.matmul(delta_CV, head.weight_VD).mul_(scale_C[:, None])
        if self.weight_VD is not None:
            scaled_CD = head.hidden_TD[rows] * scale_C[:, None]
            if head.hidden_TD.dtype == head.dtype:
                self.weight_VD.addmm_(delta_CV.T, scaled_CD)
            else:
                self.weight_VD += head.matmul(delta_CV.T, scaled_CD.to(head.hidden_TD.dtype))
        if self.bias_V is not None:
            self.bias_V += scale_C @ delta_CV

    def result(
        self, shard: VocabularyShard | None
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """In the order of the inputs; autograd casts them to the inputs' dtypes."""
        if shard is not None and self.hidden_TD is not None:
            shard.sum(self.hidden_TD)
        return self.hidden_TD, self.weight_VD, self.bias_V
