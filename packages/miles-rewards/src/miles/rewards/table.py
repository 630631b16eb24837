"""What ``miles-rewards grade`` prints."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from miles.core.protocols.reward import RewardOutcome
from miles.rewards.batch import scalar

_TEXT_CHARS = 60


@dataclass(frozen=True, slots=True)
class Graded:
    """Rows of a file and what became of them."""

    rows: Sequence[dict[str, Any]]
    outcomes: Sequence[RewardOutcome]
    key: str | None
    """Entry of rewards that are mappings."""
    label: str
    """Column of the label."""
    response: str
    """Column of the response."""
    expected: str | None
    """Column to compare the rewards with."""

    def disagreements(self) -> list[int]:
        """Rows whose reward is not what the column says."""
        if self.expected is None:
            return []
        return [
            position
            for position, (row, outcome) in enumerate(zip(self.rows, self.outcomes))
            if (wanted := row.get(self.expected)) is not None and not _same(scalar(outcome, self.key), wanted)
        ]


def _same(score: float, wanted: Any) -> bool:
    if isinstance(wanted, bool):
        return (score > 0) == wanted
    return abs(score - float(wanted)) < 1e-6


def report(graded: Graded, elapsed_s: float, num_listed: int) -> Iterator[str]:
    """Lines: verdicts, disagreements, slowest rows."""
    outcomes, total = graded.outcomes, len(graded.outcomes)
    if not total:
        yield "no rows"
        return
    mean = sum(scalar(outcome, graded.key) for outcome in outcomes) / total
    yield f"{total} rows in {elapsed_s:.2f} s, mean reward {mean:.4f}, {sum(o.failed for o in outcomes)} failed"
    for category, count in Counter(outcome.category for outcome in outcomes).most_common():
        yield f"  {category:20} {count:8}  {count / total:6.1%}"
    if graded.expected is not None:
        yield from _disagreements(graded, graded.expected, num_listed)
    yield "slowest:"
    for position in sorted(range(total), key=lambda row: -outcomes[row].seconds)[:num_listed]:
        yield f"  {outcomes[position].seconds * 1000:9.2f} ms  {_line(graded, position)}"


def _disagreements(graded: Graded, column: str, num_listed: int) -> Iterator[str]:
    known = sum(row.get(column) is not None for row in graded.rows)
    different = graded.disagreements()
    if not known:
        yield f"no row has {column!r}"
        return
    yield f"agreement with {column!r}: {known - len(different)} of {known}, {1 - len(different) / known:.2%}"
    for position in different[:num_listed]:
        yield f"  wanted {graded.rows[position][column]!r:6} {_line(graded, position)}"
    if len(different) > num_listed:
        yield f"  ... and {len(different) - num_listed} more"


def _line(graded: Graded, position: int) -> str:
    row, outcome = graded.rows[position], graded.outcomes[position]
    label, response = _short(str(row.get(graded.label))), _short(str(row.get(graded.response))[-_TEXT_CHARS:])
    score = scalar(outcome, graded.key)
    return f"row {position + 1}: {score:g} ({outcome.category})  label {label}  response ...{response}"


def _short(text: str) -> str:
    printable = "".join(char if char.isprintable() else " " for char in text)
    return printable if len(printable) <= _TEXT_CHARS else printable[: _TEXT_CHARS - 3] + "..."
