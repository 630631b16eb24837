"""A policy whose log-probabilities are its engine's, to the bit (``--true-on-policy-mode``).

The numbers come from the engine's own arithmetic, run in this process over the weights being trained; their gradient is
that of the trainer's forward pass over the same weights.

T = response tokens of one micro-batch, A = response tokens of the rollout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

from miles.core.errors import TrainingError
from miles.core.math.logprobs import LogProbs
from miles.core.protocols.scorer import EngineScorer
from miles.core.training.columns import Columns
from miles.core.training.micro_batch import MicroBatch
from miles.core.training.model import Model, Output, StepLoss
from miles.core.types.batch import Floats, Ints, RolloutBatch
from miles.core.weights.adapter_form import AdapterForm


class OnPolicyModel:
    """``model`` with the log-probabilities of ``scorer``.  ``weights`` gives its whole weights, or the tensors of its
    ``adapter`` where engines add that themselves; collective.

    A response is scored once per set of weights: the pass for the old log-probabilities serves the first step as well.
    """

    def __init__(
        self,
        model: Model,
        scorer: EngineScorer,
        weights: Callable[[], Iterator[tuple[str, torch.Tensor]]],
        adapter: AdapterForm | None = None,
    ) -> None:
        self._model = model
        self._scorer = scorer
        self._weights = weights
        self._adapter = adapter
        self._known: dict[bytes, Floats] = {}
        """Log-probabilities of responses under the weights as they are, by prompt length and token ids."""
        self._is_current = False

    def score(self, micro_batches: Sequence[MicroBatch], *, with_entropy: bool = False) -> list[LogProbs]:
        exact = self._exact(micro_batches)
        if not with_entropy:
            return [LogProbs(logp_T) for logp_T in exact]
        own = self._model.score(micro_batches, with_entropy=True)
        return [LogProbs(logp_T, scores.entropy_T) for logp_T, scores in zip(exact, own, strict=True)]

    def accumulate(self, micro_batches: Sequence[MicroBatch], output: Output, loss: StepLoss) -> None:
        exact = self._exact(micro_batches)

        def exact_loss(number: int, own: LogProbs) -> torch.Tensor:
            # x - x is exactly 0: the value is the engine's, the gradient the trainer's.
            logp_T = own.logp_T - own.logp_T.detach() + exact[number]
            return loss(number, LogProbs(logp_T, own.entropy_T))

        self._model.accumulate(micro_batches, output, exact_loss)

    def step(self, learning_rate: float) -> float:
        self.weights_changed()
        return self._model.step(learning_rate)

    def weights_changed(self) -> None:
        """What the engine's arithmetic holds is no longer what is trained."""
        self._is_current = False
        self._known.clear()

    def drop_gradient(self) -> None:
        self._model.drop_gradient()

    def reset_optimizer(self) -> None:
        self._model.reset_optimizer()

    def _exact(self, micro_batches: Sequence[MicroBatch]) -> list[torch.Tensor]:
        """[T] of each micro-batch."""
        if not self._is_current:
            self._scorer.take(self._weights(), self._adapter)
            self._is_current = True
        samples = [_samples(micro_batch) for micro_batch in micro_batches]
        wanted = {_key(*sample): sample for part in samples for sample in part}
        unknown = {key: sample for key, sample in wanted.items() if key not in self._known}
        if unknown:
            tokens, lengths = zip(*unknown.values(), strict=True)
            self._known |= dict(zip(unknown, self._scorer.score(tokens, lengths), strict=True))
        return [
            torch.from_numpy(
                np.concatenate([np.zeros(0, np.float32), *(self._known[_key(*sample)] for sample in part)])
            ).to(micro_batch.targets_T.device)
            for micro_batch, part in zip(micro_batches, samples, strict=True)
        ]


def check_on_policy(batch: RolloutBatch, columns: Columns) -> None:
    """TrainingError, naming the samples, unless trainer and engine agree on every trained token to the bit.

    Tokens of older weights than those that train are not compared.
    """
    assert columns.old_logp_A is not None
    assert columns.rollout_logp_A is not None
    compared_A = columns.mask_A != 0
    if batch.weight_versions is not None:
        versions_A = torch.from_numpy(np.concatenate(batch.weight_versions)).to(compared_A.device)
        compared_A = compared_A & (versions_A == batch.rollout_id)
    difference_A = torch.where(compared_A, columns.old_logp_A - columns.rollout_logp_A, 0.0).abs()
    if not difference_A.any():
        return
    different = [
        index
        for index, part in zip(batch.sample_indices, difference_A.split(columns.layout.lengths), strict=True)
        if part.any()
    ]
    raise TrainingError(
        f"--true-on-policy-mode: rollout {batch.rollout_id}: the engine's log-probabilities differ from the trainer's "
        f"by up to {difference_A.max().item():.3g}, in the samples {different}. Both compute alike on one machine only"
    )


def _samples(micro_batch: MicroBatch) -> list[tuple[Ints, int]]:
    """Token ids and response length of each sample."""
    ids = [tokens.cpu().numpy() for tokens in micro_batch.whole_samples()]
    return list(zip(ids, micro_batch.layout.lengths, strict=True))


def _key(tokens: Ints, response_length: int) -> bytes:
    return response_length.to_bytes(8, "little") + tokens.tobytes()
