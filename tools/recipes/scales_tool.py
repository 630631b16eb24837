"""The scales of ``scales.py``: their definition, their use, and the reward of an answer."""

from __future__ import annotations

import hashlib
from typing import Any

from miles.core.types.sample import Sample

SPECS = [
    {
        "type": "function",
        "function": {
            "name": "weigh",
            "description": "Weigh a box, in pounds.",
            "parameters": {"type": "object", "properties": {"box": {"type": "integer"}}, "required": ["box"]},
        },
    }
]


async def execute(name: str, params: dict[str, Any]) -> str:
    """``--generate-execute-tool-function-path``"""
    return str(weight(params["box"]))


async def reward(args: Any, sample: Sample, **kwargs: Any) -> float:
    """``--custom-rm-path``: 1 when the last turn is the weight and nothing else."""
    answer = sample.response.rpartition("assistant\n")[2]
    return float(answer.strip() == str(sample.label))


def weight(box: int) -> int:
    """Two digits that nobody can guess."""
    return 10 + int.from_bytes(hashlib.sha256(str(box).encode()).digest()[:4], "little") % 90
