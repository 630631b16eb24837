"""From logits to tokens, for all rows at once and each with its own parameters.

A row's token depends on its logits, its parameters and ``uniform(seed, position)`` only, so it is the same whatever
is sampled with it.  Log-probabilities are natural logarithms under the temperature-scaled distribution, before top-k,
top-p and min-p.

N = rows, V = vocabulary, padded with -inf to a multiple of BLOCK.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

BLOCK = 64
"""Probabilities are summed in blocks of this many tokens, then within one."""
_GREEDY_TEMPERATURE = 1e-6
_FIRST_CANDIDATES = 64
_ALL = 1 << 30


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one response is sampled and when it ends.  Names and defaults are SGLang's."""

    max_new_tokens: int = 128
    min_new_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    """-1: all."""
    min_p: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    no_stop_trim: bool = False
    n: int = 1
    sampling_seed: int | None = None

    @property
    def greedy(self) -> bool:
        return self.temperature < _GREEDY_TEMPERATURE or self.top_k == 1

    @property
    def truncates(self) -> bool:
        """Whether part of the distribution is cut off."""
        return not self.greedy and (self.top_p < 1.0 or self.top_k > 0 or self.min_p > 0.0)

    @property
    def penalizes(self) -> bool:
        return self.frequency_penalty != 0.0 or self.presence_penalty != 0.0 or self.repetition_penalty != 1.0


class SamplingRows:
    """The parameters of N rows as arrays.  Made anew only when the rows change."""

    def __init__(self, params: Sequence[SamplingParams], seeds: npt.NDArray[np.uint64]) -> None:
        self.seeds = seeds
        self.temperature = temperatures(params)
        greedy = [row for row, p in enumerate(params) if p.greedy]
        self.greedy = torch.tensor(greedy) if greedy else None
        self.all_greedy = len(greedy) == len(params)
        cut = [row for row, p in enumerate(params) if p.truncates]
        self.truncated = torch.tensor(cut) if cut else None
        self.top_k = torch.tensor([params[row].top_k if params[row].top_k > 0 else _ALL for row in cut])
        self.top_p = torch.tensor([params[row].top_p for row in cut], dtype=torch.float64)
        self.min_p = torch.tensor([params[row].min_p for row in cut])


def temperatures(params: Sequence[SamplingParams]) -> torch.Tensor | None:
    """[N, 1] what logits are divided by; None: all by 1."""
    divisors = [1.0 if p.temperature < _GREEDY_TEMPERATURE else p.temperature for p in params]
    return None if set(divisors) <= {1.0} else torch.tensor(divisors)[:, None]


def scale(logits: torch.Tensor, params: Sequence[SamplingParams]) -> None:
    """Divide the rows of ``logits`` by their temperatures, or all by that of one, as ``sample`` does."""
    if (divisors := temperatures(params)) is not None:
        logits.div_(divisors)


def padded_vocabulary(vocab_size: int) -> int:
    """V for a vocabulary."""
    return -(-vocab_size // BLOCK) * BLOCK


def sample(
    logits: torch.Tensor, probs: torch.Tensor, rows: SamplingRows, positions: npt.NDArray[np.int64]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw a token per row.

    ``logits`` [N, V] float32 is scaled by the temperature in place, ``probs`` [N, V] is room for the probabilities,
    ``positions`` [N] are the places of the new tokens in their sequences.  Returns tokens [N] and log-probs [N].
    """
    if rows.temperature is not None:
        logits.div_(rows.temperature)
    torch.softmax(logits, -1, out=probs)
    highest = logits.amax(-1)
    log_highest = probs.amax(-1).log_()
    if rows.all_greedy:
        tokens = logits.argmax(-1)
    else:
        if rows.truncated is not None:
            kept = probs[rows.truncated]
            kept.masked_fill_(kept < _thresholds(kept, rows.top_k, rows.top_p, rows.min_p)[:, None], 0.0)
            probs[rows.truncated] = kept
        tokens = _draw(probs, torch.from_numpy(uniform(rows.seeds, positions)))
        if rows.greedy is not None:
            tokens[rows.greedy] = logits[rows.greedy].argmax(-1)
    logp = logits.gather(1, tokens[:, None])[:, 0] - highest + log_highest
    return tokens, logp


def log_probs(logits: torch.Tensor) -> torch.Tensor:
    """Log-probabilities [N, V] of ``logits``, with the bits that ``sample`` returns for a token."""
    probs = torch.softmax(logits, -1)
    return logits - logits.amax(-1, keepdim=True) + probs.amax(-1, keepdim=True).log_()


def uniform(seeds: npt.NDArray[np.uint64], positions: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """A number in [0, 1) for each (seed, position): the splitmix64 finalizer applied to both in turn."""
    with np.errstate(over="ignore"):
        state = _mix(seeds + np.uint64(0x9E3779B97F4A7C15))
        state = _mix(state ^ (positions.astype(np.uint64) * np.uint64(0xD1B54A32D192ED03)))
    return (state >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _draw(weights: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """Inverse of the cumulative distribution of ``weights`` [N, V] at ``uniforms`` [N]: the block, then within."""
    num_rows = weights.shape[0]
    blocks = weights.view(num_rows, -1, BLOCK)
    sums = blocks.sum(-1)
    cumulative = sums.cumsum(-1, dtype=torch.float64)
    target = uniforms[:, None] * cumulative[:, -1:]
    block = torch.searchsorted(cumulative, target, right=True).clamp_(max=cumulative.shape[1] - 1)
    remainder = target - (cumulative.gather(1, block) - sums.gather(1, block))
    inside = blocks[torch.arange(num_rows), block[:, 0]].cumsum(-1, dtype=torch.float64)
    # The two sums of a block differ by rounding: stay below the last one, so that no zero is ever drawn.
    remainder = torch.minimum(remainder.clamp_(min=0.0), inside[:, -1:] * (1 - 2.0**-52))
    offset = torch.searchsorted(inside, remainder, right=True).clamp_(max=BLOCK - 1)
    return (block * BLOCK + offset)[:, 0]


def _thresholds(probs: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, min_p: torch.Tensor) -> torch.Tensor:
    """The least probability [N] that top-k, top-p and min-p leave; equal ones are all left.

    A token counts for top-p when the more probable ones together are below it, as in SGLang.
    """
    size = probs.shape[1]
    limited = (top_p < 1.0) | (top_k < size)
    num_candidates = min(size, _FIRST_CANDIDATES)
    while True:
        values = probs.topk(num_candidates, sorted=True).values
        cumulative = values.cumsum(-1, dtype=torch.float64)
        enough = ~limited | (top_k <= num_candidates) | (cumulative[:, -1] >= top_p)
        if num_candidates == size or bool(enough.all()):
            break
        num_candidates = min(size, 8 * num_candidates)
    left = (cumulative - values < top_p[:, None]) & (torch.arange(num_candidates) < top_k[:, None])
    last = (left.sum(-1) - 1).clamp_(min=0)
    threshold = values.gather(1, last[:, None])[:, 0]
    return torch.maximum(torch.where(limited, threshold, 0.0), min_p * values[:, 0])
