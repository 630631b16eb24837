"""Proof that an engine computes what the trainer computes: the log-probabilities of a fixed prompt on both sides."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch

from miles.core.errors import EngineError, WeightSyncError
from miles.core.types.batch import Floats, RolloutBatch
from miles.core.weights.adapter_form import PARTS, tensor_name
from miles.core.weights.engine_client import Answer, EngineClient

TOKENS = tuple((7 * i * i + 3 * i + 11) % 53 + 5 for i in range(16))
"""Small token ids, which every vocabulary has."""
_TOLERANCES = {torch.float32: 2e-3, torch.float64: 2e-3}
_HALF_TOLERANCE = 0.2
"""Mean difference in nats, by the precision of the weights that are sent.  Kernels of two systems round differently;
wrong weights show as differences of whole nats."""

_OF_ADAPTERS = tuple(tensor_name("", part) for part in PARTS)


def batch(num_samples: int) -> RolloutBatch:
    """The prompt as samples that a trainer scores: each token but the first is a response token."""
    each = range(num_samples)
    length = len(TOKENS) - 1
    return RolloutBatch(
        rollout_id=0,
        tokens=tuple(np.asarray(TOKENS, np.int64) for _ in each),
        response_lengths=(length,) * num_samples,
        loss_masks=tuple(np.ones(length, np.float32) for _ in each),
        rewards=(0.0,) * num_samples,
        raw_rewards=(0.0,) * num_samples,
        truncated=(False,) * num_samples,
        sample_indices=tuple(each),
        group_indices=tuple(each),
    )


def tolerance(dtype: torch.dtype) -> float:
    """Largest mean difference that rounding explains."""
    return _TOLERANCES.get(dtype, _HALF_TOLERANCE)


def check(urls: Iterable[str], trained: Floats, sent: Sequence[str], *, limit: float) -> float:
    """The largest mean difference in nats; WeightSyncError when it is above ``limit``.

    ``trained`` [15] are the trainer's log-probabilities, ``sent`` the names of the tensors that were sent.
    """
    worst = 0.0
    for url in urls:
        client = EngineClient(url)
        difference = float(np.abs(_engine_log_probs(client) - trained).mean())
        if not difference <= limit:
            raise WeightSyncError(
                f"engine {url} does not compute what the trainer computes: the log-probabilities of a fixed prompt "
                f"differ by {difference:.3g} on average, and rounding explains {limit:g}. {_explain(client, sent)}"
            )
        worst = max(worst, difference)
    return worst


def _engine_log_probs(client: EngineClient) -> Floats:
    answer = client.post(
        "/generate",
        {
            "input_ids": list(TOKENS),
            "sampling_params": {"max_new_tokens": 1, "temperature": 1.0, "ignore_eos": True},
            "return_logprob": True,
            "logprob_start_len": 0,
        },
    )
    scored = answer.get("meta_info", {}).get("input_token_logprobs") or []
    if [entry[1] for entry in scored] != list(TOKENS):
        raise EngineError(
            f"engine {client.url}: /generate gave no log-probabilities of its prompt: {str(answer)[:300]}"
        )
    return np.asarray([entry[0] for entry in scored[1:]], np.float32)


def _explain(client: EngineClient, sent: Sequence[str]) -> str:
    """Which tensors are to blame, as far as the engine tells what it holds."""
    if all(name.endswith(_OF_ADAPTERS) for name in sent):
        return (
            "It was sent an adapter alone: if it does not hold the weights of --hf-checkpoint otherwise, use "
            "--lora-serving merged"
        )
    try:
        held = _held_names(client.post("/weights_checker", {"action": "checksum"}))
    except EngineError:
        return "The engine does not tell which tensors it holds"
    missed = sorted(held - set(sent))
    if not missed:
        return "Every tensor it holds was sent: look at the model's configuration, and at the precision of both sides"
    shown = ", ".join(missed[:5]) + (f" and {len(missed) - 5} more" if len(missed) > 5 else "")
    return f"It holds tensors that were never sent: {shown}"


def _held_names(answer: Answer) -> set[str]:
    return {name for rank in answer.get("ranks", ()) for name in rank.get("checksums", ())}
