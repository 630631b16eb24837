"""A reward."""

from __future__ import annotations

from typing import Any

from miles.core.types import Sample


def fake_length(args: Any, sample: Sample, **kwargs: Any) -> float:
    """1 for a response of ``--fake-target-length`` characters, less the further it is from that."""
    target: int = args.fake_target_length
    return max(0.0, 1.0 - abs(len(sample.response) - target) / target)
