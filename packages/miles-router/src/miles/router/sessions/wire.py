"""Samples as safetensors: a JSON header, then the arrays, little-endian, one after the other."""

from __future__ import annotations

import json
from array import array
from collections.abc import Sequence
from typing import Any

from miles.router.sessions.samples import TrainingSample

META = "_samples_meta"
"""Tensor that holds the JSON list of what is not an array."""

_DTYPES = {"q": "I64", "B": "U8", "d": "F64", "i": "I32"}
_ALIGNMENT = 8


def write_samples(samples: Sequence[TrainingSample]) -> bytes:
    """``tokens.i``, ``loss_mask.i``, ``rollout_log_probs.i`` and so on for sample ``i``, and ``_samples_meta``."""
    meta = json.dumps([sample.described() for sample in samples], ensure_ascii=False).encode()
    tensors: dict[str, tuple[array[Any], list[int]]] = {}
    for number, sample in enumerate(samples):
        _add(tensors, f"tokens.{number}", array("q", sample.tokens))
        _add(tensors, f"rollout_log_probs.{number}", array("d", sample.rollout_log_probs))
        if sample.token_weight_versions is not None:
            _add(tensors, f"token_weight_versions.{number}", array("q", sample.token_weight_versions))
        if sample.routed_experts is not None:
            num_rows = len(sample.tokens) - 1
            shape = [num_rows, len(sample.routed_experts) // num_rows if num_rows else 0]
            tensors[f"rollout_routed_experts.{number}"] = (sample.routed_experts, shape)
    for number, sample in enumerate(samples):  # bytes after wider numbers, so that those lie at multiples of their size
        _add(tensors, f"loss_mask.{number}", array("B", sample.loss_mask))
    _add(tensors, META, array("B", meta))
    return _serialize(tensors)


def _add(tensors: dict[str, tuple[array[Any], list[int]]], name: str, values: array[Any]) -> None:
    tensors[name] = (values, [len(values)])


def _serialize(tensors: dict[str, tuple[array[Any], list[int]]]) -> bytes:
    header: dict[str, Any] = {}
    pieces: list[bytes] = []
    end = 0
    for name, (values, shape) in tensors.items():
        data = values.tobytes()
        header[name] = {"dtype": _DTYPES[values.typecode], "shape": shape, "data_offsets": [end, end + len(data)]}
        pieces.append(data)
        end += len(data)
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % _ALIGNMENT)
    return b"".join((len(head).to_bytes(8, "little"), head, *pieces))
