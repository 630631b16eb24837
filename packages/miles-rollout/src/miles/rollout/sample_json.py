"""Samples as JSON: exact, and readable by any program.  Arrays are tagged objects with base64 bytes."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
import orjson

from miles.core.types.sample import Sample

_ARRAY = "__ndarray__"
_FIELDS_WITH_ARRAYS = (
    "rollout_routed_experts",
    "multimodal_inputs",
    "multimodal_train_inputs",
    "train_metadata",
    "metadata",
)


def dumps(value: Any) -> bytes:
    """JSON of plain values, samples and arrays; TypeError names a type that has no JSON form."""
    return orjson.dumps(value, default=_plain, option=orjson.OPT_PASSTHROUGH_DATACLASS)


def loads_sample(data: dict[str, Any]) -> Sample:
    """The sample whose parsed JSON is ``data``."""
    for name in _FIELDS_WITH_ARRAYS:
        if data.get(name) is not None:
            data[name] = _with_arrays(data[name])
    return Sample.from_dict(data)


def _plain(value: Any) -> Any:
    if isinstance(value, Sample):
        return value.to_dict()
    if isinstance(value, np.ndarray):
        data = base64.b64encode(np.ascontiguousarray(value).tobytes()).decode()
        return {_ARRAY: {"dtype": value.dtype.str, "shape": list(value.shape), "base64": data}}
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value).__name__} has no JSON form")


def _with_arrays(value: Any) -> Any:
    if isinstance(value, list):
        return [_with_arrays(item) for item in value]
    if not isinstance(value, dict):
        return value
    if set(value) == {_ARRAY}:
        array = value[_ARRAY]
        flat = np.frombuffer(base64.b64decode(array["base64"]), np.dtype(array["dtype"]))
        return flat.reshape(array["shape"]).copy()
    return {name: _with_arrays(item) for name, item in value.items()}
