from __future__ import annotations

from miles.core.types.sample import Sample
from miles.rollout.staleness import oldest_version, staleness_metrics


def sample(versions: list[int], mask: list[int] | None = None) -> Sample:
    return Sample(
        response_length=len(versions),
        weight_versions=[str(version) for version in dict.fromkeys(versions)],
        token_weight_versions=versions,
        loss_mask=mask,
    )


def test_staleness_is_weighted_by_tokens() -> None:
    found = staleness_metrics([sample([3]), sample([1, 1, 2])], version=3)
    assert found == {"avg_staleness": (0 + 2 + 2 + 1) / 4, "max_staleness": 2.0}


def test_tokens_that_do_not_train_do_not_count() -> None:
    removed = sample([0])
    removed.remove_sample = True
    assert staleness_metrics([sample([0, 3], mask=[0, 1]), removed], version=3)["max_staleness"] == 0.0


def test_engines_that_count_no_versions_have_no_staleness() -> None:
    unknown = Sample(response_length=2, weight_versions=["default"])
    assert staleness_metrics([unknown], version=3) == {}
    assert oldest_version([unknown], default=7) == 7


def test_the_oldest_version_of_a_group_is_that_of_its_oldest_token() -> None:
    assert oldest_version([sample([4, 5]), sample([3])], default=9) == 3
