"""The samples of one rollout, as far as their log-probabilities go."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from miles.core.errors import DataError

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Recorded:
    """One sample.  T = prompt and response tokens, R = response tokens."""

    index: int
    tokens: list[int]
    """T ids."""
    logps: Floats
    """[R] as the engine returned them."""
    sampled: npt.NDArray[np.bool_]
    """[R] tokens that the engine sampled; others (a tool's answer) have no log-probability."""
    versions: tuple[int, ...]
    """Weight versions that the engine said it used."""
    prompt: str | list[dict[str, Any]]
    tools: list[Any] | None

    @property
    def num_response_tokens(self) -> int:
        return len(self.logps)

    @property
    def prompt_ids(self) -> list[int]:
        return self.tokens[: len(self.tokens) - len(self.logps)]

    @property
    def response_ids(self) -> list[int]:
        return self.tokens[len(self.tokens) - len(self.logps) :]


def read_recorded(path: Path, max_tokens: int) -> list[Recorded]:
    """Samples of a rollout's file, evenly chosen, with at most ``max_tokens`` in all; DataError when none has
    log-probabilities."""
    with path.open(encoding="utf-8") as lines:
        rows = [row for row in map(json.loads, lines) if row.get("rollout_log_probs") and row["response_length"]]
    if not rows:
        raise DataError(f"{path}: no sample has log-probabilities of the engine (rollout_log_probs)")
    chosen: list[Recorded] = []
    count = max(1, min(len(rows), max_tokens * len(rows) // max(1, sum(len(row["tokens"]) for row in rows))))
    for place in np.linspace(0, len(rows) - 1, count).astype(int):
        chosen.append(_recorded(rows[place]))
    return chosen


def _recorded(row: dict[str, Any]) -> Recorded:
    mask = row.get("loss_mask")
    size = row["response_length"]
    logps = np.asarray(row["rollout_log_probs"], np.float64)
    # A mask of zeros on sampled tokens (off-policy, removed) keeps their log-probability; an observation has exactly 0.
    sampled = np.ones(size, bool) if mask is None else (np.asarray(mask) != 0) | (logps != 0.0)
    return Recorded(
        index=row.get("index") or 0,
        tokens=list(row["tokens"]),
        logps=logps,
        sampled=sampled,
        versions=tuple(int(version) for version in row.get("weight_versions", ()) if str(version).isdigit()),
        prompt=row.get("prompt", ""),
        tools=(row.get("metadata") or {}).get("tools"),
    )
