"""The embedded engine without a server: its log-probabilities of given responses, to the bit.

A token's row has the same bits whether it is decoded or part of a prompt (see attention.py), so a response is scored in
one pass over the whole sample.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from miles.core.errors import EngineError
from miles.core.types.batch import Floats, Ints
from miles.core.weights.adapter_form import AdapterForm
from miles.rollout.engine_options import engine_options, engine_threads
from miles.rollout.engines.embedded.adapters import Adapters
from miles.rollout.engines.embedded.memory import available_memory
from miles.rollout.engines.embedded.model import Checkpoint, load_model
from miles.rollout.engines.embedded.sampling import SamplingParams
from miles.rollout.engines.embedded.scheduler import Limits, Scheduler
from miles.rollout.engines.embedded.sequence import Progress, Sequence

if TYPE_CHECKING:
    from miles.core.config import Config

_KV_SHARE = 8
"""Keys and values take at most this part of the free memory: they are those of a few samples at a time."""


class EmbeddedScorer:
    """The ``embedded`` entry of ``miles.engine_scorers``."""

    def __init__(self, config: Config) -> None:
        options = engine_options(config)
        checkpoint = Checkpoint.open(config.hf_checkpoint)
        self._model = load_model(
            checkpoint, checkpoint.dtype(options.get("dtype") or "auto"), options.get("model_layer") or "auto"
        )
        if not self._model.batch_invariant:
            raise EngineError(
                f"--true-on-policy-mode: the embedded engine's numbers for {checkpoint.architecture} depend on what is "
                "computed beside them. Leave the flag out"
            )
        self._adapters = Adapters(self._model.adapter_places, self._model.weights, checkpoint.path)
        kv_tokens = available_memory() // _KV_SHARE // self._model.kv_shape.token_bytes
        context_length = options.get("context_length") or config.rollout_max_context_len or checkpoint.context_length
        self._limits = Limits(context_length=int(context_length), kv_tokens=kv_tokens)
        self._temperature = config.rollout_temperature
        self._num_threads = engine_threads(config)

    def facts(self) -> dict[str, Any]:
        """See EngineScorer."""
        return {"adapters": self._adapters.facts()}

    def take(self, weights: Iterable[tuple[str, torch.Tensor]], adapter: AdapterForm | None = None) -> None:
        """See EngineScorer."""
        self._adapters.expect(adapter)
        for name, tensor in weights:
            self._model.weights.write(name, tensor.detach().cpu())

    def score(self, tokens: Seq[Ints], response_lengths: Seq[int]) -> list[Floats]:
        """See EngineScorer."""
        scheduler = Scheduler(self._model, self._limits)
        sequences = [self._sequence(*sample) for sample in zip(tokens, response_lengths, strict=True)]
        for sequence in sequences:
            if not scheduler.kv.fits_alone(len(sequence.prompt)):
                raise EngineError(
                    f"--true-on-policy-mode: a sample of {len(sequence.prompt)} tokens does not fit the engine's "
                    f"arithmetic in the trainer, which takes {self._limits.context_length} tokens of context and "
                    f"memory for {self._limits.kv_tokens}. Lower --rollout-max-response-len, or free memory"
                )
            scheduler.add(sequence)
        with _threads(self._num_threads):
            while not scheduler.idle:
                scheduler.step()
        return [np.asarray(sequence.prompt_logps, np.float32) for sequence in sequences]

    def _sequence(self, tokens: Ints, response_length: int) -> Sequence:
        return Sequence(
            rid="",
            prompt=tokens.tolist(),
            params=SamplingParams(max_new_tokens=0, temperature=self._temperature),
            seed=0,
            stop_ids=(),
            notify=_ignore,
            score_from=len(tokens) - response_length - 1,
            scales_scores=True,
        )


def _ignore(progress: Progress) -> None:
    """The scores are in the sequence."""


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """As many as an engine has: matrix libraries divide sums among them."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
