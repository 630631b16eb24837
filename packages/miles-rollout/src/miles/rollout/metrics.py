"""Metrics of a set of samples.  Names as they are logged, without ``rollout/`` or ``eval/NAME/``."""

from __future__ import annotations

import statistics
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from math import comb

import numpy as np

from miles.core.types.sample import Sample, Status

_REPETITION_CHARS = 10_000
_REPETITION_RATIO = 10.0
"""A tail of text that zlib shrinks by more than this repeats itself."""


def sample_metrics(samples: Sequence[Sample], *, category_key: str | None = None) -> dict[str, float]:
    """Lengths, truncation, repetition, caches and versions; shares of reward categories under ``category_key``."""
    if not samples:
        return {}
    metrics = _summary("response_len", [sample.effective_response_length for sample in samples])
    metrics["truncated_ratio"] = _share(sample.status is Status.TRUNCATED for sample in samples)
    metrics["repetition_frac"] = _share(is_repetitive(sample.response) for sample in samples)
    metrics |= _engine_metrics(samples)
    metrics |= _version_metrics(samples)
    if category_key is not None:
        metrics |= _categories(samples, category_key)
    return metrics


def zero_std(samples: Sequence[Sample], reward_key: str | None = None) -> dict[str, float]:
    """Groups whose rewards are all the same teach nothing: how many, by reward.  Groups of one do not count."""
    counts: Counter[float] = Counter()
    groups = [group for group in by_group(samples) if len(group) > 1 and _all_scored(group)]
    for group in groups:
        rewards = {sample.reward_value(reward_key) for sample in group}
        if len(rewards) == 1:
            counts[round(rewards.pop(), 1) + 0.0] += 1  # -0.0 is 0.0
    metrics: dict[str, float] = {f"zero_std/count_{reward}": count for reward, count in counts.items()}
    if groups:
        metrics["zero_std/all_zero_percentage"] = counts[0.0] / len(groups)
        metrics["zero_std/all_one_percentage"] = counts[1.0] / len(groups)
    return metrics


def correct_lengths(samples: Sequence[Sample], reward_key: str | None = None) -> dict[str, float]:
    """``--log-correct-samples``: lengths of the responses with a reward of 1."""
    lengths = [
        sample.effective_response_length
        for sample in samples
        if sample.reward is not None and sample.reward_value(reward_key) == 1
    ]
    if not lengths:
        return {}
    percentiles = {f"correct_length/p{p}": float(np.percentile(lengths, p)) for p in (25, 50, 75, 100)}
    return percentiles | {"correct_response_lengths": statistics.fmean(lengths)}


def pass_at_k(samples: Sequence[Sample], reward_key: str | None = None) -> dict[str, float]:
    """``pass@1``, ``pass@2``, ``pass@4`` ... up to the group size: unbiased estimates, a reward of 1 counts as passed.

    A group of n samples with c passes contributes ``1 - C(n - c, k) / C(n, k)`` (arXiv:2107.03374).
    """
    scored = [group for group in by_group(samples) if _all_scored(group)]
    if not scored:
        return {}
    groups = [[sample.reward_value(reward_key) for sample in group] for group in scored]
    metrics = {}
    k = 1
    while k <= min(map(len, groups)):
        metrics[f"pass@{k}"] = statistics.fmean(_group_pass(rewards, k) for rewards in groups)
        k *= 2
    return metrics


def throughput(samples: Sequence[Sample], seconds: float, num_engines_or_gpus: int) -> dict[str, float]:
    """Tokens per second of a rollout, all tokens and trained tokens (``effective_``)."""
    if not samples or seconds <= 0:
        return {}
    metrics: dict[str, float] = {}
    lengths = {
        "": [sample.response_length for sample in samples],
        "effective_": [sample.effective_response_length for sample in samples],
    }
    for prefix, values in lengths.items():
        metrics[f"{prefix}tokens_per_gpu_per_sec"] = sum(values) / seconds / max(1, num_engines_or_gpus)
        metrics[f"longest_{prefix}sample_tokens_per_sec"] = max(values) / seconds
    waiting = [sample.non_generation_time for sample in samples]
    if any(waiting):
        metrics |= _summary("non_generation_time", waiting)
        for prefix, values in lengths.items():
            longest = max(range(len(values)), key=values.__getitem__)
            metrics[f"longest_{prefix}sample_non_generation_time"] = waiting[longest]
            busy = max(seconds - waiting[longest], 1e-9)
            metrics[f"longest_{prefix}sample_tokens_per_sec_without_non_generation"] = values[longest] / busy
    return metrics


def multi_turn_metrics(samples: Sequence[Sample], max_response_len: int | None) -> dict[str, float]:
    """``--log-multi-turn``: lengths with and without observations, and rounds where samples count them."""
    metrics: dict[str, float] = {}
    lengths = {
        "raw": [sample.response_length for sample in samples],
        "wo_obs": [sample.effective_response_length for sample in samples],
    }
    for name, values in lengths.items():
        prefix = f"{name}_response_length/response_length"
        metrics |= {
            f"{prefix}_mean": statistics.fmean(values),
            f"{prefix}_max": max(values),
            f"{prefix}_min": min(values),
        }
        if max_response_len is not None:
            metrics[f"{prefix}_clip_ratio"] = _share(value >= max_response_len for value in values)
    rounds = [sample.metadata["round_number"] for sample in samples if "round_number" in sample.metadata]
    if rounds:
        prefix = "multi_turn_metric/round_number"
        metrics |= {
            f"{prefix}_mean": statistics.fmean(rounds),
            f"{prefix}_max": max(rounds),
            f"{prefix}_min": min(rounds),
        }
    return metrics


def by_group(samples: Iterable[Sample]) -> list[list[Sample]]:
    """Samples of the same prompt together, in order of appearance."""
    groups: dict[int | None, list[Sample]] = defaultdict(list)
    for sample in samples:
        groups[sample.group_index].append(sample)
    return list(groups.values())


def is_repetitive(text: str) -> bool:
    """Whether the end of a long text repeats itself, judged by how well it compresses."""
    if len(text) <= _REPETITION_CHARS:
        return False
    tail = text[-_REPETITION_CHARS:].encode()
    return len(tail) / len(zlib.compress(tail, 9)) > _REPETITION_RATIO


def _summary(name: str, values: Sequence[float]) -> dict[str, float]:
    return {
        f"{name}/mean": statistics.fmean(values),
        f"{name}/median": statistics.median(values),
        f"{name}/max": max(values),
        f"{name}/min": min(values),
    }


def _share(flags: Iterable[bool]) -> float:
    return statistics.fmean(map(float, flags))


def _engine_metrics(samples: Sequence[Sample]) -> dict[str, float]:
    metrics: dict[str, float] = {}
    cached = sum(sample.prefix_cache_info.cached_tokens for sample in samples)
    prompted = sum(sample.prefix_cache_info.prompt_tokens for sample in samples)
    if prompted:
        metrics["prefix_cache_hit_rate"] = cached / prompted
        metrics["avg_cached_tokens_per_sample"] = cached / len(samples)
    steps = sum(sample.spec_info.verify_steps for sample in samples)
    drafted = sum(sample.spec_info.draft_tokens for sample in samples)
    if steps:
        metrics["spec_accept_length"] = sum(sample.spec_info.completion_tokens for sample in samples) / steps
    if drafted:
        metrics["spec_accept_rate"] = sum(sample.spec_info.accepted_tokens for sample in samples) / drafted
    return metrics


def _version_metrics(samples: Sequence[Sample]) -> dict[str, float]:
    versions = [set(sample.weight_versions) for sample in samples]
    numbers = [int(version) for found in versions for version in found if version.isdigit()]
    if not numbers:
        return {}
    return {
        "weight_version/min": min(numbers),
        "weight_version/max": max(numbers),
        "mixed_version_ratio": _share(len(found) > 1 for found in versions),
    }


def _categories(samples: Sequence[Sample], key: str) -> dict[str, float]:
    counts: Counter[str] = Counter()
    for sample in samples:
        if isinstance(sample.reward, dict) and key in sample.reward:
            counts[str(sample.reward[key])] += 1
        elif key == "category" and "reward_category" in sample.metadata:
            counts[str(sample.metadata["reward_category"])] += 1
    return {f"error_cat/{category}": count / len(samples) for category, count in counts.items()}


def _all_scored(group: Sequence[Sample]) -> bool:
    return all(sample.reward is not None for sample in group)


def _group_pass(rewards: Sequence[float], k: int) -> float:
    n, passed = len(rewards), sum(reward == 1 for reward in rewards)
    return 1.0 - comb(n - passed, k) / comb(n, k)
