"""What the evaluations of a run came to, counted from the samples that it wrote."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from miles.core.run_directory import RunDirectory

FULL_REWARD = 1.0 - 1e-6
"""A response with at least this reward passes."""

Row = dict[str, Any]
"""A line of a samples file: the fields of ``Sample``, and ``pieces``, the text of each response token."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """One evaluation of the policy on one data set."""

    rollout_id: int
    """Rollouts that the policy had been trained on."""
    dataset: str
    num_samples: int
    pass_rate: float
    """Share of responses with the full reward, 1."""
    mean_reward: float
    mean_length: float
    """Response tokens."""


def evaluations(run: RunDirectory) -> list[Evaluation]:
    """Every evaluation of the run, in order."""
    key = run.read_config().get("eval_reward_key") or run.read_config().get("reward_key")
    found = []
    for rollout_id, dataset, path in run.eval_files():
        rewards, lengths = [], []
        for row in read_rows(path):
            rewards.append(reward_of(row, key))
            lengths.append(row["response_length"])
        if rewards:
            count = len(rewards)
            passed = sum(reward >= FULL_REWARD for reward in rewards)
            found.append(
                Evaluation(rollout_id, dataset, count, passed / count, sum(rewards) / count, sum(lengths) / count)
            )
    return found


def read_rows(path: Path) -> Iterator[Row]:
    """The lines of a samples file."""
    with path.open() as lines:
        for line in lines:
            yield json.loads(line)


def reward_of(row: Row, key: str | None) -> float:
    """The scalar reward of a line; a sample without one counts as 0."""
    reward = row.get("reward")
    if isinstance(reward, dict):
        reward = reward.get(key) if key else None
    return float(reward) if reward is not None else 0.0
