"""From hidden states to tokens and log-probabilities.

N = sequences, V = vocabulary, padded (see sampling.py).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from miles.rollout.engines.embedded.model import Model
from miles.rollout.engines.embedded.sampling import SamplingRows, log_probs, padded_vocabulary, sample, scale
from miles.rollout.engines.embedded.sequence import Seats, Sequence

TopLogps = list[tuple[float, int]]
Ints = npt.NDArray[np.int64]
_SCORED_ROWS = 256
"""Prompt rows whose logits are made at once."""


class Rows:
    """The sequences of one sampling, and what about them matters at every token.  Made anew when they change."""

    def __init__(self, sequences: list[Sequence], seats: Seats) -> None:
        self.sequences = sequences
        self.seats: Ints = np.fromiter((sequence.seat for sequence in sequences), np.int64, len(sequences))
        self.sampling = SamplingRows([sequence.params for sequence in sequences], seats.seed[self.seats])
        numbered = list(enumerate(sequences))
        self.altering = [(row, sequence) for row, sequence in numbered if sequence.alters_logits]
        self.topping = [(row, sequence) for row, sequence in numbered if sequence.num_top_logps]
        self.stopping = [(row, sequence) for row, sequence in numbered if sequence.matches_stop is not None]
        self.streaming = [(row, sequence) for row, sequence in numbered if sequence.stream]


class Head:
    """The model's head and the sampler behind it."""

    def __init__(self, model: Model, seats: Seats) -> None:
        self._model = model
        self._seats = seats
        self._rows = Rows([], seats)
        self._logits = torch.empty(0, 0)
        self._probs = torch.empty(0, 0)

    def rows(self, sequences: list[Sequence]) -> Rows:
        """What ``draw`` needs to know of ``sequences``; the last answer is kept."""
        if self._rows.sequences != sequences:
            self._rows = Rows(sequences, self._seats)
        return self._rows

    def draw(self, rows: Rows, hidden: torch.Tensor) -> tuple[Ints, npt.NDArray[np.float32]]:
        """The next token of each of ``rows`` from ``hidden`` [N, hidden], and its log-probability."""
        logits = self._compute(hidden)
        for row, sequence in rows.altering:
            self._alter(logits[row], sequence)
        tokens, logps = sample(logits, self._probs[: len(logits)], rows.sampling, self._seats.held[rows.seats])
        for row, sequence in rows.topping:
            sequence.top_logps.append(_top(log_probs(logits[row : row + 1])[0], sequence.num_top_logps))
        return tokens.numpy(), logps.numpy()

    def score(self, sequence: Sequence, hidden: torch.Tensor, targets: list[int]) -> None:
        """Append the log-probability of each of ``targets`` under ``hidden`` [len(targets), hidden]."""
        for first in range(0, len(targets), _SCORED_ROWS):
            wanted = torch.tensor(targets[first : first + _SCORED_ROWS])
            logits = self._compute(hidden[first : first + _SCORED_ROWS])
            if sequence.scales_scores:
                scale(logits, [sequence.params])
            logps = log_probs(logits)
            sequence.prompt_logps += logps.gather(1, wanted[:, None])[:, 0].tolist()
            if sequence.num_top_logps:
                sequence.prompt_top_logps += [_top(row, sequence.num_top_logps) for row in logps]

    def _compute(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [N, V] of ``hidden`` [N, hidden], in a buffer that the next call reuses."""
        count = hidden.shape[0]
        num_rows = -(-count // self._model.row_multiple) * self._model.row_multiple
        if num_rows > self._logits.shape[0]:
            size = (num_rows, padded_vocabulary(self._model.vocab_size))
            self._logits = torch.full(size, float("-inf"))
            self._probs = torch.empty(size)
        if num_rows != count:
            hidden = torch.cat([hidden, hidden.new_zeros(num_rows - count, hidden.shape[1])])
        self._model.logits(hidden, self._logits[:num_rows, : self._model.vocab_size])
        return self._logits[:count]

    def _alter(self, logits: torch.Tensor, sequence: Sequence) -> None:
        """Apply penalties (of tokens so far) and the minimum length to one row, as SGLang does."""
        params = sequence.params
        made = int(self._seats.made[sequence.seat])
        if params.penalizes:
            output = torch.from_numpy(self._seats.tokens[sequence.seat, :made])
            if params.repetition_penalty != 1.0:
                seen = torch.cat([torch.tensor(sequence.prompt), output]).unique()
                values = logits[seen]
                factor = params.repetition_penalty
                logits[seen] = torch.where(values > 0, values / factor, values * factor)
            used, counts = output.unique(return_counts=True)
            logits[used] -= params.frequency_penalty * counts + params.presence_penalty
        if made < params.min_new_tokens:
            logits[list(sequence.stop_ids)] = float("-inf")


def _top(logps: torch.Tensor, count: int) -> TopLogps:
    """The ``count`` most probable tokens with their log-probabilities."""
    values, tokens = logps.topk(min(count, logps.shape[0]))
    return list(zip(values.tolist(), tokens.tolist(), strict=True))
