"""Samples in files: one JSON object per line, exact and readable, each with the text of its response tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from operator import attrgetter
from pathlib import Path
from typing import Any

import orjson

from miles.core.errors import CheckpointError, DataError
from miles.core.types.sample import Group, PrefixCacheInfo, Sample, SpecInfo
from miles.rollout import sample_json
from miles.rollout.text import ChatTokenizer

_PIECES = "pieces"
_BUFFER_BYTES = 1 << 16
_FIELDS = tuple(field.name for field in dataclasses.fields(Sample))
_values = attrgetter(*_FIELDS)
# Of flat classes: ``asdict`` would walk through values that are plain, sample after sample.
_COUNTS = {
    name: (nothing, tuple(field.name for field in dataclasses.fields(nothing)))
    for name, nothing in (("spec_info", SpecInfo()), ("prefix_cache_info", PrefixCacheInfo()))
}


def write_samples(path: Path, samples: Iterable[Sample], tokenizer: ChatTokenizer | None = None) -> None:
    """Replace ``path``.  With a tokenizer every line has ``pieces``: the text of each response token."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb", buffering=_BUFFER_BYTES) as file:
        for sample in samples:
            file.write(sample_json.dumps(_line(sample, tokenizer)) + b"\n")
    partial.replace(path)


def read_samples(path: Path) -> list[Sample]:
    """What ``write_samples`` wrote; DataError names file and line of what cannot be read."""
    if not path.is_file():
        raise DataError(f"{path}: no such file of samples")
    samples = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            data = orjson.loads(line)
            data.pop(_PIECES, None)
            samples.append(sample_json.loads_sample(data))
        except (ValueError, TypeError, AttributeError) as error:
            raise DataError(f"{path}:{number}: not a sample: {error}") from error
    return samples


def write_groups(path: Path, groups: list[Group]) -> None:
    """Write groups into a new file, exactly."""
    try:
        path.write_bytes(sample_json.dumps(groups))
    except TypeError as error:
        raise CheckpointError(f"{path}: a sample in generation cannot be saved: {error}") from error


def read_groups(path: Path) -> list[Group]:
    """What ``write_groups`` wrote."""
    try:
        return [[sample_json.loads_sample(sample) for sample in group] for group in orjson.loads(path.read_bytes())]
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: the groups in generation cannot be read: {error}") from error


def _line(sample: Sample, tokenizer: ChatTokenizer | None) -> dict[str, Any]:
    """Fields that say something; what is left out reads back as its default."""
    data = {name: value for name, value in zip(_FIELDS, _values(sample), strict=True) if value is not None}
    for name, (nothing, fields) in _COUNTS.items():
        counts = data.pop(name)
        if counts != nothing:
            data[name] = {field: getattr(counts, field) for field in fields}
    if tokenizer is not None:
        data[_PIECES] = tokenizer.pieces(sample.response_tokens)
    return data
