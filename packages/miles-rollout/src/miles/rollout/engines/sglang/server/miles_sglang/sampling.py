# mypy: disable-error-code="import-not-found"
"""Sampling by one uniform number per token, made of the request's seed and the token's position.

SGLang on a CPU draws with ``torch.multinomial`` (20 times slower), gives every request without a seed the same one, and
stops at min-p.  Without ``--enable-deterministic-inference`` it passes no seeds on, and every draw is a new one.
"""

from __future__ import annotations

import random
from functools import wraps
from typing import Any

import torch
from sglang.srt.layers import sampler
from sglang.srt.model_executor.model_runner import ModelRunner
from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo

_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_FIRST = 0xBF58476D1CE4E5B9 - (1 << 64)
_SECOND = 0x94D049BB133111EB - (1 << 64)


def install(seed: int) -> None:
    """Sample so in every request; ``seed`` is for those that bring none."""
    sampler.multinomial_with_seed = multinomial_with_seed
    sampler.sampling_from_probs_torch = sampling_from_probs
    sampler.top_k_top_p_min_p_sampling_from_probs_torch = sampling_from_truncated_probs
    # Its kernels are an accelerator's; on a CPU the seeds alone decide.
    ModelRunner.maybe_enable_batch_invariant_mode = lambda self: None
    SamplingBatchInfo.from_schedule_batch = _with_seeds(SamplingBatchInfo.from_schedule_batch, random.Random(seed))


def _with_seeds(from_schedule_batch: Any, draw: random.Random) -> Any:
    @wraps(from_schedule_batch)
    def seeded(batch: Any, *args: Any, **named: Any) -> Any:
        for request in batch.reqs:
            if request.sampling_params.sampling_seed is None:
                request.sampling_params.sampling_seed = draw.getrandbits(62)
        return from_schedule_batch(batch, *args, **named)

    return seeded


def uniform(seed: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    """[B] numbers in [0, 1), a function of ``seed`` [B] and ``position`` [B] (the mixer of splitmix64, twice)."""
    mixed = _mix(_mix(seed.long()) + (position.long() + 1) * _GOLDEN)
    return _shifted(mixed, 11).double() * 2.0**-53


def sample(weights: torch.Tensor, seed: torch.Tensor | None, position: torch.Tensor) -> torch.Tensor:
    """[B, 1] indices drawn with probability in proportion to ``weights`` [B, V]."""
    upto = weights.cumsum(-1, dtype=torch.float64)
    drawn = torch.rand(len(weights), dtype=torch.float64) if seed is None else uniform(seed, position)
    target = drawn[:, None] * upto[:, -1:]
    return torch.searchsorted(upto, target, right=True).clamp_max(weights.shape[1] - 1)


def multinomial_with_seed(logprobs: torch.Tensor, seed: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """SGLang's function of this name."""
    return sample(logprobs.exp(), seed, positions)


def sampling_from_probs(
    probs: torch.Tensor, sampling_seed: torch.Tensor | None, positions: torch.Tensor
) -> torch.Tensor:
    """SGLang's ``sampling_from_probs_torch``."""
    return sample(probs, sampling_seed, positions).view(-1).to(torch.int32)


def sampling_from_truncated_probs(
    probs: torch.Tensor,
    top_ks: torch.Tensor,
    top_ps: torch.Tensor,
    min_ps: torch.Tensor,
    need_min_p_sampling: bool,
    sampling_seed: torch.Tensor | None,
    positions: torch.Tensor,
    *,
    return_filtered_probs: bool = False,
    max_top_k: int | None = None,
) -> Any:
    """SGLang's ``top_k_top_p_min_p_sampling_from_probs_torch``."""
    del max_top_k  # a limit for batches without seeds
    ranked, order = probs.sort(dim=-1, descending=True, stable=True)
    before = ranked.cumsum(-1) - ranked
    kept = (torch.arange(ranked.shape[1]) < top_ks.view(-1, 1)) & (before <= top_ps.view(-1, 1))
    if need_min_p_sampling:
        kept &= ranked >= ranked[:, :1] * min_ps.view(-1, 1)
    ranked = ranked.masked_fill(~kept, 0.0)
    chosen = sample(ranked, sampling_seed, positions)
    tokens = order.gather(1, chosen).view(-1).to(torch.int32)
    if return_filtered_probs:
        return tokens, ranked, order.to(torch.int32), ranked.gather(1, chosen).view(-1)
    return tokens


def _mix(value: torch.Tensor) -> torch.Tensor:
    value = (value ^ _shifted(value, 30)) * _FIRST
    value = (value ^ _shifted(value, 27)) * _SECOND
    return value ^ _shifted(value, 31)


def _shifted(value: torch.Tensor, bits: int) -> torch.Tensor:
    """To the right, as unsigned numbers."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)
