"""The weights that engines generate with, kept by the trainer while they are newer there (``--keep-old-actor``).

R = response tokens of a sample, A = response tokens of the rollout.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from miles.core.errors import TrainingError
from miles.core.math.logprobs import LogProbs
from miles.core.training.micro_batch import MicroBatch
from miles.core.training.model import Scorer
from miles.core.training.tagged_weights import TaggedWeights
from miles.core.types.batch import RolloutBatch

# One that engines have, and the one before it: the rollout that is trained on was begun before they changed.
_KEPT = 2


class OldPolicies:
    """The last sets of weights that were sent to engines, by their versions: copies in host memory."""

    def __init__(self, weights: TaggedWeights, model: Scorer) -> None:
        self._weights = weights
        self._model = model
        self.versions: list[int] = []
        """Oldest first."""

    def keep(self, version: int) -> None:
        """Keep the weights that are in the model now, which engines get as ``version``."""
        if version in self.versions:
            return
        self._weights.keep(self.tag(version))
        self.versions.append(version)
        if len(self.versions) > _KEPT:
            self._weights.drop(self.tag(self.versions.pop(0)))

    def expect(self, versions: Sequence[int]) -> None:
        """Have copies of ``versions`` and no others, to be filled with what a checkpoint holds."""
        for version in self.versions:
            self._weights.drop(self.tag(version))
        self.versions = list(versions)
        for version in versions:
            self._weights.keep(self.tag(version))

    def version_of_tokens(self, batch: RolloutBatch) -> torch.Tensor:
        """[A] for each response token the kept version that made it, or the one closest to that.

        Raises TrainingError where the rollout does not say.
        """
        if batch.weight_versions is None:
            raise TrainingError(
                f"rollout {batch.rollout_id} does not say which weights made its tokens, which --keep-old-actor needs; "
                "let the generate function fill in token_weight_versions, as engines report them, or use "
                "--use-rollout-logprobs"
            )
        assert self.versions, "engines got weights before they generated"
        made_by_A = np.concatenate(batch.weight_versions)
        kept = np.asarray(self.versions)
        newest_before = np.maximum(np.searchsorted(kept, made_by_A, side="right") - 1, 0)
        return torch.from_numpy(kept[newest_before])

    def scorer(self, version: int) -> Scorer:
        """The policy with the weights of ``version``."""
        return _OldPolicy(self._weights, self.tag(version), self._model)

    @property
    def tags(self) -> list[str]:
        """What all of them are kept under."""
        return [self.tag(version) for version in self.versions]

    @staticmethod
    def tag(version: int) -> str:
        """What the weights of ``version`` are kept under."""
        return f"old-{version}"


class _OldPolicy:
    """The model with other weights, which only scores."""

    def __init__(self, weights: TaggedWeights, tag: str, model: Scorer) -> None:
        self._weights = weights
        self._tag = tag
        self._model = model

    def score(self, micro_batches: Sequence[MicroBatch], *, with_entropy: bool = False) -> list[LogProbs]:
        with self._weights.swapped_in(self._tag):
            return self._model.score(micro_batches, with_entropy=with_entropy)
