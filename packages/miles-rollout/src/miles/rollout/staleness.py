"""How old samples are: rollouts trained on between the weights that made a token and those that learn from it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

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
        for made_by, trains in _tokens(sample):
            if trains:
                age = version - made_by
                total, count, largest = total + age, count + 1, max(largest, age)
    return {"avg_staleness": total / count, "max_staleness": float(largest)} if count else {}


def _tokens(sample: Sample) -> Iterator[tuple[int, int]]:
    """(weight version, whether it trains) of every response token whose version is known."""
    versions = sample.token_weight_versions
    if versions is None or sample.remove_sample:
        return iter(())
    mask = [1] * sample.response_length if sample.loss_mask is None else sample.loss_mask
    return zip(versions, mask, strict=True)
