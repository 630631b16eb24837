"""What ``miles-rewards grade`` prints."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from miles.core.protocols.reward import RewardOutcome
from miles.rewards.batch import Rows, scalar

_TEXT_CHARS = 60


@dataclass(frozen=True, slots=True)
class Graded:
    """Rows of a file and what became of them."""

    rows: Rows
    outcomes: Sequence[RewardOutcome]
    key: str | None
    """Entry of rewards that are mappings."""
    label: str
    """Column of the label."""
    response: str
    """Column of the response."""
    known: Sequence[float | bool | None] | None
    """Rewards to compare with, None where there is none."""

    def disagreements(self) -> list[int]:
        """Positions of rows whose reward is not the known one."""
        pairs = zip(self.known or (), self.outcomes)
        return [
            position
            for position, (wanted, outcome) in enumerate(pairs)
            if wanted is not None and not _same(scalar(outcome, self.key), wanted)
        ]


def _same(score: float, wanted: float | bool) -> bool:
    if isinstance(wanted, bool):
        return (score > 0) == wanted
    return abs(score - wanted) < 1e-6


def report(graded: Graded, elapsed_s: float, num_listed: int) -> Iterator[str]:
    """Lines: verdicts, disagreements, slowest rows."""
    outcomes, total = graded.outcomes, len(graded.outcomes)
    if not total:
        yield "no rows"
        return
    mean = sum(scalar(outcome, graded.key) for outcome in outcomes) / total
    yield f"{total} rows in {elapsed_s:.2f} s, mean reward {mean:.4f}, {sum(o.failed for o in outcomes)} failed"
    for category, count in Counter(outcome.category for outcome in outcomes).most_common():
        yield f"  {category:20} {count:8}  {count / total:6.1%}{_reason(category, graded)}"
    if graded.known is not None:
        yield from _disagreements(graded, graded.known, num_listed)
    yield "slowest:"
    for position in sorted(range(total), key=lambda row: -outcomes[row].seconds)[:num_listed]:
        yield f"  {outcomes[position].seconds * 1000:9.2f} ms  {_line(graded, position)}"


def _reason(category: str, graded: Graded) -> str:
    """Where a failure came first, and why."""
    cases = zip(graded.rows.items(), graded.outcomes)
    number, row, outcome = next((*row, outcome) for row, outcome in cases if outcome.category == category)
    if not outcome.failed:
        return ""
    why = _short(outcome.detail)
    if category == "bad_label" and graded.label not in row:
        why = f"no column {graded.label!r}; --label-key names the column of the labels"
    return f"  first in line {number}: {why}"


def _disagreements(graded: Graded, known: Sequence[float | bool | None], num_listed: int) -> Iterator[str]:
    total, different = sum(wanted is not None for wanted in known), graded.disagreements()
    yield f"agreement: {total - len(different)} of {total}, {1 - len(different) / total:.2%}"
    for position in different[:num_listed]:
        yield f"  wanted {known[position]!r:6} {_line(graded, position)}"
    if len(different) > num_listed:
        yield f"  ... and {len(different) - num_listed} more"


def _line(graded: Graded, position: int) -> str:
    (number, row), outcome = list(graded.rows.items())[position], graded.outcomes[position]
    label, response = _short(str(row.get(graded.label))), _short(str(row.get(graded.response))[-_TEXT_CHARS:])
    score = scalar(outcome, graded.key)
    return f"line {number}: {score:g} ({outcome.category})  label {label}  response ...{response}"


def _short(text: str) -> str:
    printable = "".join(char if char.isprintable() else " " for char in text)
    return printable if len(printable) <= _TEXT_CHARS else printable[: _TEXT_CHARS - 3] + "..."
