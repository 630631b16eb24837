from __future__ import annotations

from typing import Any

from miles.core.types.sample import Sample
from miles.rollout.tools.metrics import tool_metrics


def sample(index: int, **metadata: Any) -> Sample:
    return Sample(index=index, group_index=0, metadata=metadata)


def test_without_tools_and_agents_there_is_nothing_to_tell() -> None:
    assert tool_metrics([sample(0), sample(1, n=3)]) == {}


def test_calls_and_failures() -> None:
    samples = [
        sample(0, tool_calls=3, tool_failures={"timeout": 1, "error": 1}, round_number=4),
        sample(1, tool_calls=1, tool_failures={"error": 1}, round_number=2),
        sample(2, tool_calls=0, tool_failures={}, round_number=1),
        sample(2, tool_calls=0, tool_failures={}, round_number=1),  # another turn of the same conversation
    ]
    assert tool_metrics(samples) == {
        "tools/calls_per_sample": 4 / 3,
        "tools/used_ratio": 2 / 3,
        "tools/turns_per_sample": 7 / 3,
        "tools/failed_ratio": 3 / 4,
        "tools/failed_timeout": 1.0,
        "tools/failed_error": 2.0,
    }


def test_agents_and_what_they_report() -> None:
    samples = [
        sample(0, num_turns=2, agent_error="x", agent_metrics={"steps": 3, "name": "a"}),
        sample(1, num_turns=1, agent_metrics={"steps": 5}),
        sample(2, num_turns=1),
    ]
    assert tool_metrics(samples) == {"agent/failed_ratio": 1 / 3, "agent/steps": 4.0}
