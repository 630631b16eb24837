"""Metrics of conversations with tools and of agents, from the accounts in samples' metadata."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence

from miles.core.types.sample import Sample


def tool_metrics(samples: Sequence[Sample]) -> dict[str, float]:
    """``tools/...`` where samples called tools, ``agent/...`` where agents made them; empty without either."""
    return _tools(samples) | _agents(samples)


def _tools(samples: Sequence[Sample]) -> dict[str, float]:
    # Turns of one conversation share its accounts.
    counted = list({_execution(sample): sample for sample in samples if "tool_calls" in sample.metadata}.values())
    if not counted:
        return {}
    failures: Counter[str] = Counter()
    for sample in counted:
        failures.update(sample.metadata.get("tool_failures") or {})
    calls = sum(sample.metadata["tool_calls"] for sample in counted)
    metrics = {
        "tools/calls_per_sample": calls / len(counted),
        "tools/used_ratio": statistics.fmean(sample.metadata["tool_calls"] > 0 for sample in counted),
        "tools/turns_per_sample": statistics.fmean(sample.metadata.get("round_number", 0) for sample in counted),
    }
    if calls:
        metrics["tools/failed_ratio"] = failures.total() / calls
    return metrics | {f"tools/failed_{kind}": float(count) for kind, count in failures.items()}


def _agents(samples: Sequence[Sample]) -> dict[str, float]:
    agents = [sample for sample in samples if "num_turns" in sample.metadata]
    if not agents:
        return {}
    metrics = {"agent/failed_ratio": statistics.fmean("agent_error" in sample.metadata for sample in agents)}
    reported = [sample.metadata.get("agent_metrics") or {} for sample in agents]
    for name in sorted({name for found in reported for name in found}):
        values = [found[name] for found in reported if isinstance(found.get(name), int | float)]
        if values:
            metrics[f"agent/{name}"] = statistics.fmean(values)
    return metrics


def _execution(sample: Sample) -> tuple[int | None, int | None]:
    return sample.group_index, sample.index if sample.rollout_id is None else sample.rollout_id
