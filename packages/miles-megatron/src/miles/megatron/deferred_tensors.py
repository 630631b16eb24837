"""The tensors of a ``torch_dist`` checkpoint, written when the caller wants, from any thread.

Megatron-Core's own asynchronous strategy forks writers and ends with exchanges in the groups of training.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp

from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.strategies.base import SaveShardedStrategy
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from miles.core.training.writing import Writer


class DeferredTensors(SaveShardedStrategy):  # type: ignore[misc]
    """Takes the tensors of one checkpoint, or copies of them: what is written beside training, and weights that are in
    the model only while they are taken, must not change."""

    can_handle_sharded_objects = True

    def __init__(self, writer: Writer, *, copies: bool) -> None:
        super().__init__("torch_dist", 1)
        self._writer = writer
        self._copies = copies
        self._tensors: dict[str, Any] = {}
        self._directory = Path()

    def save(self, sharded_state_dict: dict[str, Any], checkpoint_dir: Path) -> None:
        """Called by ``dist_checkpointing.save``; nothing is written yet."""
        if self._copies:
            sharded_state_dict = dict_list_map_inplace(_copied, sharded_state_dict)
        self._tensors = self._named(sharded_state_dict)
        self._directory = Path(checkpoint_dir)

    def write(self) -> None:
        """Write what ``save`` took.  Collective."""
        dcp.save(
            self._tensors,
            storage_writer=dcp.FileSystemWriter(self._directory, single_file_per_rank=True),
            planner=MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False),
            process_group=self._writer.group,
        )
        self._tensors = {}

    @staticmethod
    def _named(sharded_state_dict: dict[str, Any]) -> dict[str, Any]:
        """By the names in the file; of each tensor the rank that is its main replica."""
        tensors, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict, True)
        named: dict[str, Any] = mcore_to_pyt_state_dict(tensors, False)
        return named


@torch.no_grad()  # type: ignore[untyped-decorator]
def _copied(value: Any) -> Any:
    """The same piece of a tensor, in memory that nobody changes."""
    if isinstance(value, ShardedTensor) and value.data is not None:
        value.data = value.data.detach().to("cpu", copy=True)
    return value
