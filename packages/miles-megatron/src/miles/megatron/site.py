"""Where a rank computes: its device, its precision and its place in every kind of parallelism."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from miles.core.flags.algorithm import Algorithm
from miles.core.flags.cluster import Cluster
from miles.core.flags.data import Data
from miles.core.flags.training import Training
from miles.core.protocols.backend import Rank
from miles.core.training.packing import Packing
from miles.core.training.vocabulary import GroupVocabularyShard
from miles.megatron.flags import Parallelism
from miles.megatron.packed_inputs import Layout

if TYPE_CHECKING:
    from miles.core.config import Config

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, slots=True)
class Site:
    """A rank among the others."""

    rank: Rank
    device: torch.device
    dtype: torch.dtype
    layout: Layout

    @classmethod
    def join(cls, config: Config, rank: Rank) -> Site:
        """Take the device and enter the process groups.  Collective."""
        training, parallel = config[Training], config[Parallelism]
        _silence()
        device = torch.device(training.device, rank.local_rank if training.device == "cuda" else None)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        _Groups.join(lambda: _join_groups(config, rank, device))
        model_parallel_cuda_manual_seed(config[Algorithm].seed)
        layout = Layout(
            context_size=training.context_parallel_size,
            context_rank=parallel_state.get_context_parallel_rank(),
            sequence_shards=parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1,
            multiple=config[Data].data_pad_size_multiplier,
        )
        return cls(rank, device, _DTYPES[training.train_dtype], layout)

    def leave(self) -> None:
        """Leave all process groups, unless another role of this process is still in them."""
        _Groups.leave()


class _Groups:
    """The process groups, of which a process has one set: an actor and a critic in one process share it."""

    members = 0

    @classmethod
    def join(cls, create: Callable[[], None]) -> None:
        """Be in them.  The first one creates them."""
        if cls.members == 0:
            create()
        cls.members += 1

    @classmethod
    def leave(cls) -> None:
        """Leave them.  The last one destroys them."""
        cls.members -= 1
        if cls.members == 0:
            parallel_state.destroy_model_parallel()
            dist.destroy_process_group()


def _join_groups(config: Config, rank: Rank, device: torch.device) -> None:
    """Enter the world and the groups of every kind of parallelism.  Collective."""
    training, cluster, parallel = config[Training], config[Cluster], config[Parallelism]
    if not dist.is_initialized():
        _join_world(rank, device, cluster.distributed_backend, 60.0 * cluster.distributed_timeout_minutes)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size,
        context_parallel_size=training.context_parallel_size,
        expert_model_parallel_size=parallel.expert_model_parallel_size,
        expert_tensor_parallel_size=parallel.expert_tensor_parallel_size,
        distributed_timeout_minutes=round(cluster.distributed_timeout_minutes),
    )


def _silence() -> None:
    """Megatron-Core calls torch by names that torch has replaced, and torch says so at every kind of call."""
    for message in (r"`torch\.distributed\.", r"`load_state_dict` is deprecated", r"`save_state_dict` is deprecated"):
        warnings.filterwarnings("ignore", category=FutureWarning, message=message)


def _join_world(rank: Rank, device: torch.device, backend: str, timeout_s: float) -> None:
    backend = f"cpu:gloo,cuda:{backend}" if device.type == "cuda" else "gloo"
    if rank.world_size == 1:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        return
    dist.init_process_group(
        backend,
        init_method=f"tcp://{rank.master}",
        rank=rank.rank,
        world_size=rank.world_size,
        timeout=timedelta(seconds=timeout_s),
    )


class PipelineRanks:
    """The data-parallel ranks of a pipeline's stage, for the training procedure.

    Ranks that share the samples (tensor, context, pipeline) compute the same; only the last stage sees the output.
    """

    def __init__(self) -> None:
        self._data = parallel_state.get_data_parallel_group()
        self._pipeline = parallel_state.get_pipeline_model_parallel_group()
        self._last = parallel_state.get_pipeline_model_parallel_last_rank()
        self._stages = parallel_state.get_pipeline_model_parallel_world_size()
        self.index = parallel_state.get_data_parallel_rank()
        self.count = parallel_state.get_data_parallel_world_size()
        self.has_output = parallel_state.is_pipeline_last_stage()
        self.context = None  # the model divides samples itself and gives whole ones

    def adapted(self, packing: Packing) -> Packing:
        """A row holds every sample whole.  The interleaved schedule takes micro-batches in groups of its stages."""
        shared = packing.shared_by(parallel_state.get_context_parallel_world_size())
        interleaved = parallel_state.get_virtual_pipeline_model_parallel_world_size() is not None
        return replace(shared, shares_prompts=False, multiple=self._stages if interleaved else 1)

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        dist.all_reduce(values, group=self._data)
        if self._stages > 1:
            dist.broadcast(values, self._last, group=self._pipeline)
        return values

    def publish(self, value: Any) -> Any:
        if self._stages == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, self._last, group=self._pipeline)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Of all ranks: what one stage knows, the others must hear too."""
        values: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(values, value)
        return values


def vocabulary_shard(first: int) -> GroupVocabularyShard | None:
    """The rows of the output head on this rank, the first of them token ``first``; None: all rows."""
    if parallel_state.get_tensor_model_parallel_world_size() == 1:
        return None
    return GroupVocabularyShard(parallel_state.get_tensor_model_parallel_group(), first)
