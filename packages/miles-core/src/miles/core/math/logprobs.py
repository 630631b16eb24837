"""Log-probabilities and entropies of given tokens, without the logits of a whole micro-batch.

T = tokens, C = tokens of one chunk, D = hidden size, V = vocabulary.

The distribution is ``softmax((hidden @ weight.T + bias) / temperature)``, before any top-p or top-k truncation.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

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
) -> LogProbs:
    """Log-probabilities of ``target_T`` under the language-model head, ``chunk_size`` tokens at a time.

    Neither the forward nor the backward pass holds more logits than those of one chunk: the backward pass computes
    them again.  Only what fits one chunk is kept instead.  ``chunk_size`` None: chunks of the fastest size, and the
    logits of all tokens are kept where they fit a small budget of memory.

    Results are in fp32 (fp64 for fp64 inputs), and so are logits, softmax and the sum of the head's gradient over
    chunks, whatever the dtype of hidden states and head.
    """
    _check_temperature(temperature)
    num_tokens, vocabulary = len(hidden_TD), len(weight_VD)
    if chunk_size is None:
        on_cpu = hidden_TD.device.type == "cpu"
        chunk_numel = _CPU_CHUNK_NUMEL if on_cpu else _ACCELERATOR_CHUNK_NUMEL
        chunk_size = max(chunk_numel // vocabulary, _MIN_CHUNK_TOKENS)
        keep = num_tokens * vocabulary <= (_CPU_KEPT_NUMEL if on_cpu else _ACCELERATOR_KEPT_NUMEL)
    else:
        keep = num_tokens <= chunk_size
    plan = _Plan(tuple(_chunks(num_tokens, chunk_size)), keep, temperature, with_entropy)
    return LogProbs(*_LinearLogProbs.apply(hidden_TD, weight_VD, bias_V, target_T, plan))


@dataclass(frozen=True, slots=True)
class _Plan:
    chunks: tuple[slice, ...]
    keep: bool
    """Whether the backward pass finds the log-softmax of every chunk instead of computing it again."""
    temperature: float
    with_entropy: bool


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
        head = _Head(hidden_TD, weight_VD, bias_V, plan.temperature)
        logp_T = hidden_TD.new_empty(len(hidden_TD), dtype=head.dtype)
        entropy_T = torch.empty_like(logp_T) if plan.with_entropy else None
        keep = plan.keep and any(ctx.needs_input_grad)
        kept = []
        for rows in plan.chunks:
            log_softmax_CV = head.log_softmax(rows)
            logp_T[rows] = log_softmax_CV.gather(1, target_T[rows, None]).squeeze(1)
            if entropy_T is not None:
                entropy_T[rows] = _entropy(log_softmax_CV)
            if keep:
                kept.append(log_softmax_CV)
        ctx.save_for_backward(hidden_TD, weight_VD, bias_V, target_T, entropy_T, *kept)
        ctx.plan = plan
        return logp_T, entropy_T

    @staticmethod
    def backward(
        ctx: Any, grad_logp_T: torch.Tensor | None, grad_entropy_T: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        hidden_TD, weight_VD, bias_V, target_T, entropy_T, *kept = ctx.saved_tensors
        head = _Head(hidden_TD, weight_VD, bias_V, ctx.plan.temperature)
        if grad_logp_T is None:
            grad_logp_T = torch.zeros(len(hidden_TD), dtype=head.dtype, device=hidden_TD.device)
        grads = _HeadGradients(head, ctx.needs_input_grad[:3])
        for number, rows in enumerate(ctx.plan.chunks):
            log_softmax_CV = kept[number] if kept else head.log_softmax(rows)
            target_C, grad_logp_C = target_T[rows], grad_logp_T[rows]
            if grad_entropy_T is None:
                grads.add(rows, _policy_delta(log_softmax_CV, target_C), -grad_logp_C)
            else:
                delta_CV = _policy_and_entropy_delta(
                    log_softmax_CV, target_C, grad_logp_C, entropy_T[rows], grad_entropy_T[rows]
                )
                grads.add(rows, delta_CV, torch.ones_like(grad_logp_C))
        return *grads.result(), None, None


def _chunks(num_tokens: int, chunk_size: int) -> Iterator[slice]:
    for start in range(0, num_tokens, chunk_size):
        yield slice(start, min(start + chunk_size, num_tokens))


def _policy_delta(log_softmax_CV: torch.Tensor, target_C: torch.Tensor) -> torch.Tensor:
    """``-d logp / d logits = p - onehot(target)``."""
    delta_CV = log_softmax_CV.exp()
    return delta_CV.scatter_add_(1, target_C[:, None], delta_CV.new_full((len(target_C), 1), -1.0))


def _policy_and_entropy_delta(
    log_softmax_CV: torch.Tensor,
    target_C: torch.Tensor,
    grad_logp_C: torch.Tensor,
    entropy_C: torch.Tensor,
    grad_entropy_C: torch.Tensor,
) -> torch.Tensor:
    """Gradient of both outputs with respect to the logits; ``dH / d logits = -p (log p + H)``."""
    delta_CV = (log_softmax_CV + entropy_C[:, None]).mul_(-grad_entropy_C[:, None]).sub_(grad_logp_C[:, None])
    delta_CV.mul_(log_softmax_CV.exp())
    return delta_CV.scatter_add_(1, target_C[:, None], grad_logp_C[:, None])


class _Head:
    """Log-softmax of a language-model head, for a slice of the tokens at a time."""

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
        logits_CV = self.matmul(self.hidden_TD[rows], self.weight_VD.T)
        if self.bias_V is not None:
            logits_CV += self.bias_V
        if self.temperature != 1.0:
            logits_CV /= self.temperature
        return logits_CV.log_softmax(-1)

    def matmul(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """``a @ b`` with sums and result in at least fp32."""
        if b.dtype == self.dtype:
            return a @ b
        return torch.mm(a.to(b.dtype), b, out_dtype=self.dtype)


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

    def result(self) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """In the order of the inputs; autograd casts them to the inputs' dtypes."""
        return self.hidden_TD, self.weight_VD, self.bias_V
