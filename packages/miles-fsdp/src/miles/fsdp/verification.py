"""Proof, at every start, that a model answers the same packed as alone."""

from __future__ import annotations

import torch

from miles.core.errors import TrainingError
from miles.core.math.logprobs import token_logprobs
from miles.core.math.ragged import Ragged
from miles.core.training.micro_batch import MicroBatch
from miles.core.training.segments import Segments
from miles.fsdp.policy import PolicyModule

# Two samples of unequal length: a leak across their border, or a head that does more than multiply, changes the answer.
_LENGTHS = (5, 3)
# fp32 rounding through deep models stays far below; a mistake is far above.
_TOLERANCE = 1e-2


@torch.no_grad()  # type: ignore[untyped-decorator]
def verify_packing(module: PolicyModule, path: str) -> None:
    """Compare log-probabilities of a small pack with transformers' own forward pass, one sample at a time.

    Catches models whose attention, positions, recurrent state or output head are not what packing assumes.
    Raises TrainingError when they differ.
    """
    packed = _probe(module.lm.config.get_text_config().vocab_size)
    expected = torch.cat([_alone(module, tokens) for tokens in packed.tokens_P.split(_LENGTHS)])
    difference = (module(packed, False).logp_T - expected).abs().max().item()
    if not difference <= _TOLERANCE:
        raise TrainingError(
            f"{path}: {type(module.lm).__name__} gives other log-probabilities for packed samples than for the same "
            f"samples alone (by {difference:.3g}); the fsdp backend cannot train this architecture"
        )


def _alone(module: PolicyModule, tokens: torch.Tensor) -> torch.Tensor:
    """Log-probability of every token but the first, by the model's full forward pass."""
    segments = Segments([len(tokens)], tokens.device)
    logits = module.lm(input_ids=tokens[None], use_cache=False, segments=segments).logits[0, :-1]
    return token_logprobs(logits, tokens[1:], temperature=module.temperature).logp_T


def _probe(vocab_size: int) -> MicroBatch:
    total = sum(_LENGTHS)
    tokens = (torch.arange(total) * 7919 + 11) % vocab_size
    rows = torch.cat(
        [torch.arange(start, start + n - 1) for start, n in ((0, _LENGTHS[0]), (_LENGTHS[0], _LENGTHS[1]))]
    )
    return MicroBatch(
        samples=(0, 1),
        segments=Segments(_LENGTHS, tokens.device),
        layout=Ragged([n - 1 for n in _LENGTHS]),
        tokens_P=tokens,
        positions_P=torch.cat([torch.arange(n) for n in _LENGTHS]),
        rows_T=rows,
        targets_T=tokens[rows + 1],
        columns_T=torch.arange(len(rows)),
    )
