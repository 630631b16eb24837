"""Log-probabilities of recorded tokens under a Hugging Face model, and under what may have gone wrong.

R = response tokens of one sample, V = vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from miles.core.diagnosis.samples import Floats, Recorded

TEMPERATURES = tuple(round(0.05 * step, 2) for step in range(2, 41))
TOP_P = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.98, 0.99)
TOP_K = (2, 5, 10, 20, 50, 100)
_IMPOSSIBLE = -100.0
"""For a token outside of the support."""


class Scorer:
    """One model in one precision."""

    def __init__(self, directory: Path, dtype: torch.dtype = torch.float32) -> None:
        logging.disable_progress_bar()
        self._model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            directory, dtype=dtype, trust_remote_code=True
        ).eval()

    def logits(self, prompt_ids: Sequence[int], response_ids: Sequence[int]) -> torch.Tensor:
        """[R, V] float32: of the positions that predict the response."""
        tokens = torch.tensor([[*prompt_ids, *response_ids]])
        with torch.no_grad():
            logits: torch.Tensor = self._model(tokens).logits[0, -len(response_ids) - 1 : -1]
        return logits.float()

    def score(self, samples: Sequence[Recorded], temperature: float) -> list[Floats]:
        """[R] of each sample at ``temperature``."""
        return [
            log_probs(self.logits(sample.prompt_ids, sample.response_ids), sample.response_ids, temperature)
            for sample in samples
        ]

    def score_after(
        self, prompts: Sequence[Sequence[int]], samples: Sequence[Recorded], temperature: float
    ) -> list[Floats]:
        """The same, after other prompts."""
        return [
            log_probs(self.logits(prompt, sample.response_ids), sample.response_ids, temperature)
            for prompt, sample in zip(prompts, samples, strict=True)
        ]

    def score_settings(
        self, samples: Sequence[Recorded], temperature: float, top_p: Iterable[float], top_k: Iterable[int]
    ) -> tuple[Mapping[float, list[Floats]], Mapping[str, list[Floats]]]:
        """By other temperatures, and by ``top_p P`` and ``top_k K`` at the given temperature."""
        temperatures: dict[float, list[Floats]] = {value: [] for value in TEMPERATURES}
        supports: dict[str, list[Floats]] = {}
        for sample in samples:
            logits, targets = self.logits(sample.prompt_ids, sample.response_ids), sample.response_ids
            for value, found in temperatures.items():
                found.append(log_probs(logits, targets, value))
            for name, scores in _supports(logits, targets, temperature, top_p, top_k).items():
                supports.setdefault(name, []).append(scores)
        return temperatures, supports


def log_probs(logits: torch.Tensor, targets: Sequence[int], temperature: float) -> Floats:
    """[R] of ``targets`` under ``logits`` [R, V] / ``temperature``."""
    scores = torch.log_softmax(logits / max(temperature, 1e-4), -1)
    found: Floats = scores.gather(1, torch.tensor(targets)[:, None])[:, 0].double().numpy()
    return found


def _supports(
    logits: torch.Tensor, targets: Sequence[int], temperature: float, top_p: Iterable[float], top_k: Iterable[int]
) -> dict[str, Floats]:
    """Log-probabilities renormalized over a truncated support."""
    scores = torch.log_softmax(logits / max(temperature, 1e-4), -1)
    own = scores.gather(1, torch.tensor(targets)[:, None])[:, 0].double()
    ordered = scores.double().exp().sort(-1, descending=True).values
    mass = ordered.cumsum(-1)
    found = {}
    for p in top_p:
        # The smallest set with at least probability p.
        size = (mass - ordered < p).sum(-1, keepdim=True)
        found[f"top_p {p:g}"] = _renormalized(own, ordered, mass, size)
    for k in top_k:
        if 0 < k < ordered.shape[1]:
            found[f"top_k {k}"] = _renormalized(own, ordered, mass, torch.full((len(targets), 1), k))
    return found


def _renormalized(own: torch.Tensor, ordered: torch.Tensor, mass: torch.Tensor, size: torch.Tensor) -> Floats:
    least = ordered.gather(1, size - 1)[:, 0]
    inside = own.exp() >= least * (1 - 1e-9)
    renormalized = own - mass.gather(1, size - 1)[:, 0].log()
    scores: Floats = torch.where(inside, renormalized, torch.full_like(own, _IMPOSSIBLE)).numpy()
    return scores
