"""A reward that a few dozen updates can raise: the share of a response's bytes that are digits."""

from __future__ import annotations

from typing import Any

from miles.core.types.sample import Sample


async def digits(args: Any, sample: Sample) -> float:
    return sum(char.isdigit() for char in sample.response) / max(len(sample.response), 1)
