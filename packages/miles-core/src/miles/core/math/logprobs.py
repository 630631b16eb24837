"""Log-probabilities and entropies of given tokens, without the logits of a whole micro-batch.

T = tokens, C = tokens of one chunk, D = hidden size, V = vocabulary.

The distribution is ``softmax((hidden @ weight.T + bias) / temperature)``, before any top-p or top-k truncation.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

# Logits of one chunk, in numbers: 64 MiB of fp32 on CPU, 1 GiB on an accelerator.
_CPU_CHUNK_NUMEL = 2**24
_ACCELERATOR_CHUNK_NUMEL = 2**28
# Fewer tokens than this make the product with the head wait for memory.
_MIN_CHUNK_TOKENS = 64


class LogProbs(NamedTuple):
    """Of given tokens: natural-log probability, and (when asked for) entropy of the distribution they come from, in
    nats."""

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
    """Log-probabilities of ``target_T`` under the language-model head ``weight_VD``, ``chunk_size`` tokens at a time.

    Neither the forward nor the backward pass holds more logits than those of one chunk: the backward pass computes them
    again.  When all tokens fit one chunk, what the forward pass made is kept instead.  ``chunk_size`` None takes as
    many tokens as fit a budget of memory.  Results are in fp32 (fp64 for fp64 inputs), and so are logits, softmax and
    the sum of the head's gradient over chunks, whatever the dtype of hidden states and head.
    """
    _check_temperature(temperature)
    if chunk_size is None:
        budget = _CPU_CHUNK_NUMEL if hidden_TD.device.type == "cpu" else _ACCELERATOR_CHUNK_NUMEL
        chunk_size = max(budget // len(weight_VD), _MIN_CHUNK_TOKENS)
    return LogProbs(
        *_LinearLogProbs.apply(hidden_TD, weight_VD, bias_V, target_T, temperature, chunk_size, with_entropy)
    )


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
        temperature: float,
        chunk_size: int,
        with_entropy: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        ctx.set_materialize_grads(False)
        head = _Head(hidden_TD, weight_VD, bias_V, temperature)
        logp_T = hidden_TD.new_empty(len(hidden_TD), dtype=head.dtype)
        entropy_T = torch.empty_like(logp_T) if with_entropy else None
        log_softmax_CV = None
        for rows in _chunks(len(hidden_TD), chunk_size):
            log_softmax_CV = head.log_softmax(rows)
            logp_T[rows] = log_softmax_CV.gather(1, target_T[rows, None]).squeeze(1)
            if entropy_T is not None:
                entropy_T[rows] = _entropy(log_softmax_CV)
        kept_TV = log_softmax_CV if len(hidden_TD) <= chunk_size and any(ctx.needs_input_grad) else None
        ctx.save_for_backward(hidden_TD, weight_VD, bias_V, target_T, entropy_T, kept_TV)
        ctx.temperature, ctx.chunk_size = temperature, chunk_size
        return logp_T, entropy_T

    @staticmethod
    def backward(
        ctx: Any, grad_logp_T: torch.Tensor | None, grad_entropy_T: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        hidden_TD, weight_VD, bias_V, target_T, entropy_T, kept_TV = ctx.saved_tensors
        head = _Head(hidden_TD, weight_VD, bias_V, ctx.temperature)
        if grad_logp_T is None:
            grad_logp_T = torch.zeros(len(hidden_TD), dtype=head.dtype, device=hidden_TD.device)
        grads = _HeadGradients(head, ctx.needs_input_grad[:3])
        for rows in _chunks(len(hidden_TD), ctx.chunk_size):
            log_softmax_CV = head.log_softmax(rows) if kept_TV is None else kept_TV
            if grad_entropy_T is None:
                delta_CV, scale_C = _policy_delta(log_softmax_CV, target_T[rows]), -grad_logp_T[rows]
            else:
                entropy_C, grad_entropy_C = entropy_T[rows], grad_entropy_T[rows]
                delta_CV = _policy_and_entropy_delta(
                    log_softmax_CV, target_T[rows], grad_logp_T[rows], entropy_C, grad_entropy_C
                )
                scale_C = torch.ones_like(entropy_C)
            grads.add(rows, delta_CV, scale_C / ctx.temperature)
        return *grads.result(), None, None, None, None


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
            return a.to(self.dtype) @ b
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
        """Add tokens whose gradient with respect to the head's output is ``scale * delta``.

        The scale multiplies [C, D] rather than [C, V]: the vocabulary is the larger.
        """
        if self.hidden_TD is not None:
            self.hidden_TD[rows] = self.head.matmul(delta_CV, self.head.weight_VD) * scale_C[:, None]
        if self.weight_VD is not None:
            scaled_CD = (self.head.hidden_TD[rows] * scale_C[:, None]).to(self.head.hidden_TD.dtype)
            self.weight_VD += self.head.matmul(delta_CV.T, scaled_CD)
        if self.bias_V is not None:
            self.bias_V += scale_C @ delta_CV

    def result(self) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """In the order of the inputs; autograd casts them to the inputs' dtypes."""
        return self.hidden_TD, self.weight_VD, self.bias_V
