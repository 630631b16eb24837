"""What a rank trained on, on disk: ``--save-debug-train-data``.

A safetensors file, which executes nothing when it is read.  Its metadata say what it is:

    format            "miles-train-data"
    version           "1"
    header            JSON: rollout_id, rank, and per sample: sample_indices, group_indices, prompt_lengths,
                      response_lengths, rewards, raw_rewards, truncated

Tensors hold samples end to end: ``tokens`` (prompts and responses, int64), and over the response tokens (fp32)
``loss_masks`` and whatever is known of ``log_probs``, ``ref_log_probs``, ``rollout_log_probs``, ``teacher_log_probs``,
``values``, ``entropy``, ``advantages``, ``returns``.  ``read_train_data`` cuts them into samples.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from miles.core.errors import DataError
from miles.core.training.columns import Columns
from miles.core.types.batch import RolloutBatch

FORMAT, VERSION = "miles-train-data", "1"


@dataclass(frozen=True, slots=True)
class TrainData:
    """One rank's samples of one rollout."""

    header: dict[str, Any]
    """See the module's text."""
    columns: dict[str, list[torch.Tensor]]
    """Per sample; ``tokens`` [T], the others [R]."""


def write_train_data(path: Path, batch: RolloutBatch, columns: Columns, samples: Sequence[int], rank: int) -> None:
    """Write ``samples``, positions in ``batch``, with everything that ``columns`` knows of them."""
    header = {
        "rollout_id": batch.rollout_id,
        "rank": rank,
        "sample_indices": [batch.sample_indices[i] for i in samples],
        "group_indices": [batch.group_indices[i] for i in samples],
        "prompt_lengths": [len(batch.tokens[i]) - batch.response_lengths[i] for i in samples],
        "response_lengths": [batch.response_lengths[i] for i in samples],
        "rewards": [batch.rewards[i] for i in samples],
        "raw_rewards": [batch.raw_rewards[i] for i in samples],
        "truncated": [bool(batch.truncated[i]) for i in samples],
    }
    tokens = [batch.tokens[i] for i in samples]
    tensors = {"tokens": torch.from_numpy(np.concatenate(tokens) if tokens else np.zeros(0, np.int64))}
    for name, column_A in columns.known().items():
        parts = columns.layout.split(column_A)
        tensors[name] = torch.cat([parts[i] for i in samples]).cpu() if samples else column_A[:0].cpu()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    save_file(tensors, partial, metadata={"format": FORMAT, "version": VERSION, "header": json.dumps(header)})
    partial.replace(path)


def read_train_data(path: Path) -> TrainData:
    """What ``write_train_data`` wrote.  DataError when the file is something else."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
        if (metadata.get("format"), metadata.get("version")) != (FORMAT, VERSION):
            raise DataError(f"{path} is not version {VERSION} of {FORMAT}: its metadata say {metadata}")
        header = json.loads(metadata["header"])
        responses = header["response_lengths"]
        whole = [prompt + response for prompt, response in zip(header["prompt_lengths"], responses, strict=True)]
        names: list[str] = list(file.keys())
        columns = {name: _cut(file.get_tensor(name), whole if name == "tokens" else responses) for name in names}
    return TrainData(header, columns)


def _cut(column: torch.Tensor, lengths: Sequence[int]) -> list[torch.Tensor]:
    return [column[begin:end] for begin, end in pairwise(accumulate(lengths, initial=0))]
