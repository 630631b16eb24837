"""Grading many samples outside a run."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from miles.core.errors import ConfigError, DataError
from miles.core.protocols.reward import RewardOutcome
from miles.core.types.sample import Sample
from miles.rewards.catalogue import Catalogue
from miles.rewards.context import Context, Settings
from miles.rewards.scorer import score_all
from miles.rewards.verdict import entry_of

_AT_ONCE = 4096


@dataclass(frozen=True, slots=True)
class Columns:
    """Names of the columns of a file to grade."""

    response: str = "response"
    label: str = "label"
    metadata: str = "metadata"
    prompt: str = "prompt"


Rows = dict[int, dict[str, Any]]
"""Rows of a file by the number of their line."""


def read_rows(path: Path) -> Rows:
    """The rows of a JSON Lines file.  Raises DataError naming the line."""
    try:
        return {number: _row(line, path, number) for number, line in _lines(path)}
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error


def samples_of(rows: Rows, path: Path, columns: Columns) -> list[Sample]:
    """One sample per row.  Raises DataError for a row without response."""
    return [_sample(row, f"{path}, line {number}", columns) for number, row in rows.items()]


def known_rewards(rows: Rows, path: Path, column: str) -> list[float | bool | None]:
    """What ``column`` says of each row, None where it says nothing.  Raises DataError when it never does, or when it
    says what is no reward."""
    known = [_known(row.get(column), f"{path}, line {number}", column) for number, row in rows.items()]
    if rows and all(value is None for value in known):
        raise DataError(f"{path}: no row has a column {column!r}; the first has {_names(next(iter(rows.values())))}")
    return known


async def grade_samples(rm_type: str, samples: Sequence[Sample], settings: Settings) -> list[RewardOutcome]:
    """Outcomes in order.  Raises ConfigError when there is no such type."""
    context = Context(settings)
    scorer = Catalogue(context).scorer(rm_type)
    try:
        outcomes: list[RewardOutcome] = []
        for start in range(0, len(samples), _AT_ONCE):
            outcomes += await score_all(scorer, samples[start : start + _AT_ONCE])
        return outcomes
    finally:
        await scorer.close()
        await asyncio.to_thread(context.close)


def scalar(outcome: RewardOutcome, key: str | None) -> float:
    """The reward as a number: the entry ``key`` of a mapping, or its first number.

    Raises ConfigError when there is no such number.
    """
    score = outcome.score
    if not isinstance(score, dict):
        return score
    keys = [name for name, value in score.items() if isinstance(value, (int, float))] if key is None else [key]
    number = entry_of(score, keys[0]) if keys else None
    if number is None:
        entries = ", ".join(f"{name!r}: {value!r}" for name, value in score.items()) or "none"
        raise ConfigError(
            f"--reward-key is {key!r}, which names no number in a reward with the entries {entries}"[:500]
        )
    return number


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield number, line


def _row(line: bytes, path: Path, number: int) -> dict[str, Any]:
    try:
        row = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise DataError(f"{path}, line {number}: not UTF-8 ({error})") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}, line {number}: not JSON ({error})") from error
    if not isinstance(row, dict):
        raise DataError(f"{path}, line {number}: a {type(row).__name__} where an object is expected")
    return row


def _sample(row: dict[str, Any], where: str, columns: Columns) -> Sample:
    response, metadata = row.get(columns.response), row.get(columns.metadata) or {}
    if columns.response not in row:
        option = "--response-key names the column of the responses"
        raise DataError(f"{where}: no column {columns.response!r}; it has {_names(row)}. {option}")
    if not isinstance(response, str):
        raise DataError(f"{where}: {columns.response!r} is {response!r}; it must be text")
    if not isinstance(metadata, dict):
        raise DataError(f"{where}: {columns.metadata!r} is a {type(metadata).__name__}; it must be an object")
    return Sample(
        index=row.get("index"),
        prompt=row.get(columns.prompt) or "",
        response=response,
        label=row.get(columns.label),
        metadata=metadata,
        tokens=row.get("tokens") or [],
        response_length=row.get("response_length") or 0,
    )


def _known(value: Any, where: str, column: str) -> float | bool | None:
    if value is None or isinstance(value, bool):
        return value
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        raise DataError(f"{where}: {column!r} is {value!r}; a reward is a number, true or false") from None


def _names(row: Mapping[str, Any]) -> str:
    return ", ".join(map(repr, row)) or "none"
