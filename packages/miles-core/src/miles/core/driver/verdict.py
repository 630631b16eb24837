"""Whether a finished run has learned what it had to (``--ci-metric-checker-key``)."""

from __future__ import annotations

from pathlib import Path

from miles.core.errors import TrainingError
from miles.core.flags.hooks import Hooks
from miles.core.tracking.jsonl import read_records


def verify_metric(metrics: Path, flags: Hooks) -> None:
    """TrainingError unless an evaluation of the run reached the threshold."""
    key, threshold = flags.ci_metric_checker_key, flags.ci_metric_checker_threshold
    if key is None or threshold is None:
        return
    evaluations = [record.metrics for record in read_records(metrics) if record.kind == "eval"]
    values = [metrics[key] for metrics in evaluations if key in metrics]
    if not values:
        known = sorted({name for metrics in evaluations for name in metrics})
        raise TrainingError(f"--ci-metric-checker-key {key}: no evaluation has it; there are {', '.join(known)}")
    if max(values) < threshold:
        raise TrainingError(
            f"--ci-metric-checker-key {key}: the best of {len(values)} evaluations is {max(values):.6g}, less than "
            f"--ci-metric-checker-threshold {threshold:.6g}"
        )
