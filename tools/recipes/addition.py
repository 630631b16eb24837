"""The quick start's task: sums, and demonstrations that sometimes think before they answer.

Problems are reasoning-gym's ``basic_arithmetic``, restricted to the sum of two numbers, and its own verifier scores
them.  A demonstration either answers at once, which is hard for a small model, or first adds column by column, units
before tens:

    Calculate 814 + 707.    <think></think>1521
    Calculate 814 + 707.    <think>4+7+0=11 1+0+1=02 8+7+0=15</think>1521
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import reasoning_gym

EVAL_SEED = 777
"""Held-out problems are the same whatever the run's seed."""
SEED_STRIDE = 10_000_000
"""Item i of seed s is item i - 1 of seed s + 1 in reasoning-gym: independent seeds must lie far apart."""


@dataclass(frozen=True, slots=True)
class Task:
    """How hard, and how often a demonstration thinks."""

    num_digits: int = 3
    thinking_share: float = 0.4
    num_demonstrations: int = 40_000
    num_train: int = 8_000
    num_eval: int = 256


@dataclass(frozen=True, slots=True)
class Data:
    """The files of a task."""

    demonstrations: Path
    """Rows of ``messages``: question and demonstration."""
    train: Path
    """Rows of ``prompt``, ``label`` and ``metadata`` (what the verifier needs)."""
    evaluation: Path
    """Held-out rows of the same form; none of them is among the others."""

    @classmethod
    def at(cls, directory: Path) -> Data:
        return cls(directory / "demonstrations.jsonl", directory / "train.jsonl", directory / "eval.jsonl")


def write_data(directory: Path, task: Task, seed: int) -> Data:
    """Make the three files; the same arguments make the same bytes."""
    data = Data.at(directory)
    directory.mkdir(parents=True, exist_ok=True)
    held_out = distinct(problems(task, 2 * task.num_eval, EVAL_SEED))[: task.num_eval]
    hidden = {frozenset(terms(problem)) for problem in held_out}
    first = SEED_STRIDE * (2 * seed + 1)
    train = without(problems(task, task.num_train, first), hidden)
    shown = without(problems(task, task.num_demonstrations, first + SEED_STRIDE), hidden)
    coin = random.Random(seed)
    _write_rows(data.demonstrations, (demonstration_row(p, coin.random() < task.thinking_share) for p in shown))
    _write_rows(data.train, map(prompt_row, train))
    _write_rows(data.evaluation, map(prompt_row, held_out))
    return data


def problems(task: Task, size: int, seed: int) -> Iterator[dict[str, Any]]:
    """``size`` entries of reasoning-gym: ``question``, ``answer``, ``metadata``."""
    return iter(
        reasoning_gym.create_dataset(
            "basic_arithmetic",
            size=size,
            seed=seed,
            min_terms=2,
            max_terms=2,
            min_digits=task.num_digits,
            max_digits=task.num_digits,
            operators=("+",),
            allow_parentheses=False,
            allow_negation=False,
        )
    )


def terms(problem: dict[str, Any]) -> tuple[str, ...]:
    """The numbers to add, as written: ``("814", "707")``."""
    return tuple(problem["metadata"]["expression"].split(" + "))


def distinct(entries: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without the sums that came before, in either order."""
    return list({frozenset(terms(entry)): entry for entry in entries}.values())


def without(entries: Iterable[dict[str, Any]], hidden: set[frozenset[str]]) -> Iterator[dict[str, Any]]:
    """Entries whose sum is not ``hidden``, in either order."""
    return (entry for entry in entries if frozenset(terms(entry)) not in hidden)


def column_addition(numbers: tuple[str, ...]) -> str:
    """The working, units first, one ``digits+carry=sum`` per column: ``4+7+0=11 1+0+1=02 8+7+0=15``."""
    width = max(map(len, numbers))
    carry = 0
    columns = []
    for place in range(1, width + 1):
        digits = [number.zfill(width)[-place] for number in numbers]
        total = sum(map(int, digits)) + carry
        columns.append(f"{'+'.join(digits)}+{carry}={total:02d}")
        carry = total // 10
    return " ".join(columns)


def demonstration_row(problem: dict[str, Any], thinks: bool) -> dict[str, Any]:
    """A conversation to imitate."""
    working = column_addition(terms(problem)) if thinks else ""
    answer = f"<think>{working}</think>{problem['answer']}"
    return {"messages": [_user(problem["question"]), {"role": "assistant", "content": answer}]}


def prompt_row(problem: dict[str, Any]) -> dict[str, Any]:
    """A question to answer, with what reasoning-gym's verifier needs to score it."""
    return {"prompt": [_user(problem["question"])], "label": problem["answer"], "metadata": problem["metadata"]}


def _user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def _write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    with path.open("w") as lines:
        for row in rows:
            lines.write(json.dumps(row) + "\n")
