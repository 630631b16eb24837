"""How old samples are: rollouts trained on between the weights that made a token and those that learn from it."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import compress

from miles.core.types.sample import Sample


def oldest_version(samples: Iterable[Sample], default: int) -> int:
    """The oldest weight version that made a token of the samples; ``default`` where engines do not count versions."""
    versions = [int(version) for sample in samples for version in sample.weight_versions if version.isdigit()]
    return min(versions, default=default)


def staleness_metrics(samples: Iterable[Sample], version: int) -> dict[str, float]:
    """``avg_staleness`` over the tokens that train, and ``max_staleness``, when weights ``version`` learn from them.

    Empty where no engine counts its versions.
    """
    total = count = largest = 0
    for sample in samples:
        if versions := _trained_versions(sample):
            total += version * len(versions) - sum(versions)
            count += len(versions)
            largest = max(largest, version - min(versions))
    return {"avg_staleness": total / count, "max_staleness": float(largest)} if count else {}


def _trained_versions(sample: Sample) -> list[int]:
    """Weight version of every response token that trains and whose version is known."""
    versions = sample.token_weight_versions
    if versions is None or sample.remove_sample:
        return []
    return versions if sample.loss_mask is None else list(compress(versions, sample.loss_mask))
