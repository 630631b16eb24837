"""How far the trainer's and the engine's distributions are apart, from the log-probabilities of sampled tokens.

T = response tokens, packed; S = samples.  In the terms of https://yingru.notion.site/off-policy-rl.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from miles.core.math.kl import approx_kl
from miles.core.math.masked_importance import Tokens
from miles.core.math.ratio import importance_ratio, masked_log_ratio


class Mismatch(NamedTuple):
    """Statistics by name: per token and per sample."""

    tokens: dict[str, torch.Tensor]
    samples: dict[str, torch.Tensor]


def mismatch_statistics(train_logp_T: torch.Tensor, rollout_logp_T: torch.Tensor, tokens: Tokens) -> Mismatch:
    """Divergences and perplexities of trainer and engine.

    Per token: ``kl`` and ``k3_kl`` estimate KL(engine || trainer); ``chi2_token`` is the squared ratio less 1.  Per
    sample: perplexities (exponential of the mean negative log-probability), the difference of their logarithms
    (positive where the trainer finds the sample less likely), and ``chi2_seq`` of the whole sequence's ratio.
    """
    train_logp_T, rollout_logp_T = train_logp_T.detach(), rollout_logp_T.detach()
    log_ratio_T = masked_log_ratio(train_logp_T, rollout_logp_T, tokens.mask_T == 0)
    count_S = tokens.mask_sum_S.clamp(min=1.0)
    train_log_ppl_S = -tokens.total(train_logp_T) / count_S
    rollout_log_ppl_S = -tokens.total(rollout_logp_T) / count_S
    difference_S = train_log_ppl_S - rollout_log_ppl_S
    return Mismatch(
        tokens={
            "kl": -log_ratio_T,
            "k3_kl": approx_kl(-log_ratio_T, "k3"),
            "chi2_token": importance_ratio(2.0 * log_ratio_T) - 1.0,
        },
        samples={
            "training_log_ppl": train_log_ppl_S,
            "training_ppl": train_log_ppl_S.exp(),
            "rollout_log_ppl": rollout_log_ppl_S,
            "rollout_ppl": rollout_log_ppl_S.exp(),
            "log_ppl_diff": difference_S,
            "log_ppl_abs_diff": difference_S.abs(),
            "ppl_ratio": difference_S.exp(),
            "chi2_seq": importance_ratio(2.0 * tokens.total(log_ratio_T)) - 1.0,
        },
    )
