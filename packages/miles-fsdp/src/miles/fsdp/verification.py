"""Proof, at every start, that a model answers the same packed as alone."""

from __future__ import annotations

import numpy as np
import torch

from miles.core.errors import TrainingError
from miles.core.math.logprobs import token_logprobs
from miles.core.training.micro_batch import pack, response_offsets
from miles.core.types.batch import Ints, RolloutBatch
from miles.fsdp.policy import PolicyModule

# Prompt and response tokens.  The first two samples share their prompt.
_SAMPLES = ((4, 3), (4, 2), (3, 4))
# fp32 rounding through deep models stays far below; a mistake is far above.
_TOLERANCE = 1e-2


@torch.no_grad()  # type: ignore[untyped-decorator]
def verify_packing(module: PolicyModule, path: str) -> None:
    """Compare log-probabilities of a small pack with the model's full forward pass on one sample at a time.

    Catches models whose attention, positions, recurrent state or output head are not what packing assumes.
    Raises TrainingError when they differ.
    """
    probe = _probe(module.lm.config.get_text_config().vocab_size)
    packed = pack(probe, range(len(probe)), response_offsets(probe), torch.device("cpu"))
    alone = torch.cat([_alone(module, *sample) for sample in zip(probe.tokens, probe.response_lengths, strict=True)])
    difference = (module(packed, "logprobs").logp_T - alone).abs().max().item()
    if not difference <= _TOLERANCE:
        raise TrainingError(
            f"{path}: {type(module.lm).__name__} gives other log-probabilities for packed samples than for the same "
            f"samples alone (by {difference:.3g}); the fsdp backend cannot train this architecture"
        )


def _alone(module: PolicyModule, tokens: Ints, response: int) -> torch.Tensor:
    """Log-probabilities of one sample's response from all its logits."""
    ids = torch.from_numpy(tokens)
    logits = module.layout.logits(module.lm, ids)
    start = len(ids) - response
    return token_logprobs(logits[start - 1 : -1], ids[start:], temperature=module.temperature).logp_T


def _probe(vocabulary: int) -> RolloutBatch:
    """Token ids are spread over the vocabulary, so that every sample has its own."""
    prompts = [(np.arange(prompt) * 7919 + 11 * prompt) % vocabulary for prompt, _ in _SAMPLES]
    responses = [(np.arange(response) * 6007 + 17 * response) % vocabulary for _, response in _SAMPLES]
    count = len(_SAMPLES)
    return RolloutBatch(
        rollout_id=0,
        tokens=tuple(np.concatenate(pair) for pair in zip(prompts, responses, strict=True)),
        response_lengths=tuple(map(len, responses)),
        loss_masks=tuple(np.ones(len(response), np.float32) for response in responses),
        rewards=(0.0,) * count,
        raw_rewards=(0.0,) * count,
        truncated=(False,) * count,
        sample_indices=tuple(range(count)),
        group_indices=tuple(range(count)),
    )
