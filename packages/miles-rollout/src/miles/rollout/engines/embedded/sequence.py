"""One response being generated, and the arrays that hold the progress of all of them."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from miles.rollout.engines.embedded.kv import Pool
from miles.rollout.engines.embedded.sampling import SamplingParams

Finish = dict[str, Any]
"""``{"type": "stop" | "length" | "abort", ...}`` as on the wire."""

_NO_TOKEN = -1


@dataclass(slots=True)
class Progress:
    """What a sequence has produced so far; the last one has ``finish``."""

    sequence: Sequence
    tokens: list[int]
    logps: list[float]
    finish: Finish | None
    versions: list[tuple[str, int, int]]
    """(weight version, first output token, end)"""


@dataclass(slots=True, eq=False)
class Sequence:
    """A request for one response.  Written by the server when it is made, then only by the model thread."""

    rid: str
    prompt: list[int]
    params: SamplingParams
    seed: int
    stop_ids: tuple[int, ...]
    """Token ids that end it."""
    notify: Callable[[Progress], None]
    """Called on the model thread: at the end, and after every step when ``stream``."""
    stream: bool = False
    num_top_logps: int = 0
    score_from: int | None = None
    """Prompt position from which log-probabilities of prompt tokens are wanted."""
    scales_scores: bool = False
    """Whether these are of the temperature-scaled distribution, like those of output tokens."""
    matches_stop: Callable[[list[int]], str | None] | None = None
    """Finds a stop string at the end of the output."""
    wants_experts: bool = False
    """Whether ``experts`` are to be reported."""

    seat: int = -1
    """Row in the Seats; -1 before the first admission."""
    pool: Pool[Sequence] | None = None
    slot: int = -1
    cached_tokens: int = 0
    """Prompt tokens whose keys and values were copied instead of computed."""
    num_retractions: int = 0
    version_events: list[tuple[str, int]] = field(default_factory=list)
    """(weight version, output tokens made with it and before)"""
    prompt_logps: list[float] = field(default_factory=list)
    """Of the prompt tokens after ``score_from``."""
    prompt_top_logps: list[list[tuple[float, int]]] = field(default_factory=list)
    top_logps: list[list[tuple[float, int]]] = field(default_factory=list)
    experts: npt.NDArray[np.int32] | None = None
    """[prompt + output tokens - 1, layers, experts per token], set when the sequence leaves its slot."""
    created: float = field(default_factory=time.perf_counter)
    finished: float = 0.0

    @property
    def alters_logits(self) -> bool:
        """Whether its logits are changed before sampling."""
        return self.params.penalizes or self.params.min_new_tokens > 0

    def version_spans(self, version: str, num_output: int) -> list[tuple[str, int, int]]:
        """(weight version, first output token, end), given the version now."""
        spans: list[tuple[str, int, int]] = []
        for name, end in (*self.version_events, (version, num_output)):
            start = spans[-1][2] if spans else 0
            if end > start or not spans:
                spans.append((name, start, end))
        if len(spans) > 1 and spans[0][1] == spans[0][2]:
            spans.pop(0)
        return spans


class Seats:
    """Progress of up to ``count`` sequences, one row each, so that a step's bookkeeping is array arithmetic."""

    def __init__(self, count: int) -> None:
        self.free = list(range(count - 1, -1, -1))
        self.held = np.zeros(count, np.int64)
        """Tokens whose keys and values are stored."""
        self.made = np.zeros(count, np.int64)
        """Output tokens."""
        self.limit = np.zeros(count, np.int64)
        """Output tokens at which a sequence ends."""
        self.last = np.zeros(count, np.int64)
        """The newest token, whose keys and values are not stored yet."""
        self.seed = np.zeros(count, np.uint64)
        self.stop = np.full((count, 4), _NO_TOKEN, np.int64)
        self.tokens = np.zeros((count, 256), np.int64)
        """Output tokens of each seat."""
        self.logps = np.zeros((count, 256), np.float64)

    def take(self, sequence: Sequence) -> None:
        """Give ``sequence`` a seat; there must be a free one."""
        seat = sequence.seat = self.free.pop()
        params = sequence.params
        self.tokens = _widened(self.tokens, params.max_new_tokens, 0)
        self.logps = _widened(self.logps, params.max_new_tokens, 0)
        self.stop = _widened(self.stop, len(sequence.stop_ids), _NO_TOKEN)
        self.held[seat] = self.made[seat] = 0
        self.limit[seat] = params.max_new_tokens
        self.seed[seat] = sequence.seed
        self.stop[seat] = _NO_TOKEN
        self.stop[seat, : len(sequence.stop_ids)] = sequence.stop_ids

    def give(self, sequence: Sequence) -> None:
        """Free the seat."""
        self.free.append(sequence.seat)
        sequence.seat = -1

    def output(self, sequence: Sequence) -> tuple[list[int], list[float]]:
        """Output tokens and their log-probabilities."""
        if sequence.seat < 0:
            return [], []
        count = self.made[sequence.seat]
        return self.tokens[sequence.seat, :count].tolist(), self.logps[sequence.seat, :count].tolist()

    def record(
        self, seats: npt.NDArray[np.int64], tokens: npt.NDArray[np.int64], logps: npt.NDArray[np.float32]
    ) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
        """Append a token to each of ``seats``.  Returns which matched a stop id, and which reached their limit."""
        made = self.made[seats]
        self.tokens[seats, made] = tokens
        self.logps[seats, made] = logps
        self.made[seats] = made + 1
        self.last[seats] = tokens
        matched = (self.stop[seats] == tokens[:, None]).any(axis=1)
        return matched, made + 1 >= self.limit[seats]


def _widened(array: npt.NDArray[Any], columns: int, fill: int) -> npt.NDArray[Any]:
    if columns <= array.shape[1]:
        return array
    wider = np.full((array.shape[0], max(columns, 2 * array.shape[1])), fill, array.dtype)
    wider[:, : array.shape[1]] = array
    return wider
