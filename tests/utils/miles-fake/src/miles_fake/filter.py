"""A dynamic sampling filter."""

from __future__ import annotations

from typing import Any

from miles.core.types import DynamicFilterOutput, Group


def fake_keep_long(args: Any, samples: Group) -> DynamicFilterOutput:
    """Keep groups in which any response reaches ``--fake-target-length`` characters."""
    keep = any(len(sample.response) >= args.fake_target_length for sample in samples)
    return DynamicFilterOutput(keep, None if keep else "fake_too_short")
