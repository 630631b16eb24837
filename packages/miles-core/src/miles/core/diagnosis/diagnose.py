"""One rollout of a run, scored again under every explanation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from miles.core.diagnosis.prompts import other_prompts
from miles.core.diagnosis.samples import Floats, Recorded, read_recorded
from miles.core.diagnosis.scorer import TOP_K, TOP_P, Scorer
from miles.core.diagnosis.verdict import Cause, Fit, Verdict, decide, fit
from miles.core.diagnosis.weights import Weights
from miles.core.errors import DataError
from miles.core.run_directory import RunDirectory

_MOST_VERSIONS = 6


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """A verdict and what it was made from."""

    rollout_id: int
    num_samples: int
    num_tokens: int
    verdict: Verdict

    def text(self) -> str:
        head = f"rollout {self.rollout_id}: {self.num_tokens} sampled tokens of {self.num_samples} samples"
        return f"{head}\n{self.verdict.text()}"


def diagnose(run: RunDirectory, rollout_id: int | None, given: dict[int, Path], max_tokens: int = 20_000) -> Diagnosis:
    """Explain rollout ``rollout_id``; None: the latest whose weights can be loaded.

    ``given``: Hugging Face directories of further weight versions.  DataError when there is nothing to go by.
    """
    weights = Weights(run, given)
    files = dict(run.rollout_files())
    rollout_id = _choose(weights, files, rollout_id)
    samples = read_recorded(files[rollout_id], max_tokens)
    temperature = float(weights.flag("rollout_temperature", 1.0))
    with weights.directory(rollout_id) as directory:
        scorer = Scorer(directory)
        scores = scorer.score(samples, temperature)
        own = fit(Cause.AGREE, f"weight version {rollout_id} at temperature {temperature:g}", samples, scores)
        others = [*_settings(scorer, weights, samples, temperature), *_shifts(samples, scores)]
        others += [
            fit(Cause.TEMPLATE, says, samples, scorer.score_after(prompts, samples, temperature))
            for says, prompts in other_prompts(weights.tokenizer, samples)
        ]
        rounded = Scorer(directory, torch.bfloat16).score(samples, temperature)
    others.append(fit(Cause.PRECISION, "the same weights computed in bfloat16", samples, rounded))
    others += _versions(weights, samples, temperature, rollout_id)
    verdict = decide(own, others, _distance(samples, scores, rounded))
    return Diagnosis(rollout_id, len(samples), sum(int(sample.sampled.sum()) for sample in samples), verdict)


def _choose(weights: Weights, files: dict[int, Path], wanted: int | None) -> int:
    """The rollout to look at: weights of version N made and trained rollout N."""
    known = set(weights.versions())
    if wanted is None:
        usable = [number for number in files if number in known]
        if not usable:
            raise DataError(
                f"there are weights of the versions {sorted(known)} and samples of the rollouts {sorted(files)}: no "
                "rollout has the weights it was trained from. Give a directory with --weights VERSION=DIR"
            )
        return max(usable)
    if wanted not in files:
        raise DataError(f"--rollout {wanted}: its samples are not there; there are {sorted(files)}")
    if wanted not in known:
        raise DataError(
            f"--rollout {wanted}: the weights of version {wanted} are not there; there are {sorted(known)}. Give their "
            f"Hugging Face directory with --weights {wanted}=DIR"
        )
    return wanted


def _settings(scorer: Scorer, weights: Weights, samples: Sequence[Recorded], temperature: float) -> Iterator[Fit]:
    """Other temperatures, and truncated supports."""
    top_p, top_k = float(weights.flag("rollout_top_p", 1.0)), int(weights.flag("rollout_top_k", -1))
    by_temperature, by_support = scorer.score_settings(
        samples, temperature, sorted({*TOP_P, *([top_p] if top_p < 1 else [])}), sorted({*TOP_K, max(top_k, 0)} - {0})
    )
    fits = [
        fit(Cause.TEMPERATURE, f"temperature {value:g} instead of {temperature:g}", samples, scores)
        for value, scores in by_temperature.items()
        if value != temperature
    ]
    yield min(fits, key=lambda one: one.mean)
    for says, scores in by_support.items():
        yield fit(Cause.TRUNCATION, f"probabilities renormalized after {says}", samples, scores)


def _shifts(samples: Sequence[Recorded], scores: Sequence[Floats]) -> Iterator[Fit]:
    """Log-probabilities that stand one token off."""
    for offset, says in ((1, "log-probabilities one token late"), (-1, "log-probabilities one token early")):
        yield fit(Cause.TEMPLATE, says, samples, [np.roll(score, offset) for score in scores])


def _versions(weights: Weights, samples: Sequence[Recorded], temperature: float, own: int) -> Iterator[Fit]:
    """Weights of other versions, the nearest first."""
    said = sorted({version for sample in samples for version in sample.versions})
    others = sorted((version for version in weights.versions() if version != own), key=lambda v: (abs(v - own), v))
    for version in others[:_MOST_VERSIONS]:
        with weights.directory(version) as directory:
            scores = Scorer(directory).score(samples, temperature)
        claim = f" (the engine said {', '.join(map(str, said))})" if said else ""
        says = f"weight version {version} instead of {own}{claim}"
        yield fit(Cause.STALE_VERSION, says, samples, scores)


def _distance(samples: Sequence[Recorded], first: Sequence[Floats], second: Sequence[Floats]) -> float:
    parts = [np.abs(a - b)[sample.sampled] for sample, a, b in zip(samples, first, second, strict=True)]
    return float(np.concatenate(parts).mean())
