from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from miles.core.errors import DataError
from miles.core.types.sample import PrefixCacheInfo, Sample, Status
from miles.rollout.samples_file import read_samples, write_samples
from miles.rollout.text import ChatTokenizer


def test_samples_read_back_exactly(tmp_path: Path) -> None:
    sample = Sample(
        group_index=1,
        index=2,
        prompt=[{"role": "user", "content": "ü"}],
        tokens=[5, 6, 7],
        response_length=2,
        rollout_log_probs=[-1e-17, -0.1 - 0.2],
        loss_mask=[1, 0],
        label={"a": [1, 2.5, None]},
        reward={"score": 1.0},
        status=Status.TRUNCATED,
        metadata={"nested": {"array": np.arange(6, dtype=np.int16).reshape(2, 3)}},
        weight_versions=["3"],
        rollout_routed_experts=np.ones((2, 1, 1), np.int32),
        prefix_cache_info=PrefixCacheInfo(1, 2),
    )
    write_samples(tmp_path / "a/b.jsonl", [sample, Sample()])
    read, empty = read_samples(tmp_path / "a/b.jsonl")
    assert empty == Sample()
    assert read.rollout_routed_experts is not None
    assert read.rollout_routed_experts.dtype == np.int32
    array = read.metadata["nested"].pop("array")
    assert (array == sample.metadata["nested"].pop("array")).all()
    assert array.dtype == np.int16
    read.rollout_routed_experts = sample.rollout_routed_experts = None
    assert read == sample


def test_pieces_are_written_and_not_read(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    ids = tokenizer.encode("xyz")
    write_samples(tmp_path / "a.jsonl", [Sample(tokens=ids, response_length=2)], tokenizer)
    assert json.loads((tmp_path / "a.jsonl").read_text())["pieces"] == ["y", "z"]
    assert read_samples(tmp_path / "a.jsonl")[0].metadata == {}


@pytest.mark.parametrize("line", ["{", "[1]", '{"status": "unheard of"}'])
def test_what_is_no_sample_is_named(tmp_path: Path, line: str) -> None:
    (tmp_path / "a.jsonl").write_text("{}\n" + line + "\n")
    with pytest.raises(DataError, match=r"a\.jsonl:2: not a sample"):
        read_samples(tmp_path / "a.jsonl")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.jsonl: no such file of samples"):
        read_samples(tmp_path / "a.jsonl")
