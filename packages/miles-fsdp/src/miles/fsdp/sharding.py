"""Process group, FSDP2 wrapping, and moving weights into the shards."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from miles.core.protocols.backend import Rank
from miles.core.training.context import ContextGroup


@dataclass(frozen=True, slots=True)
class Backends:
    """Communication libraries: of the device that computes, and of tensors in host memory beside an accelerator."""

    device: str
    host: str | None

    def spelled(self, device_type: str) -> str:
        """As torch.distributed wants it."""
        if device_type == "cpu" or self.host is None:
            return self.device
        return f"cpu:{self.host},{device_type}:{self.device}"


def join_group(rank: Rank, device: torch.device, backends: Backends, timeout_s: float, num_replicas: int) -> DeviceMesh:
    """Enter the group of ``rank`` (a group of one needs no network) and return its mesh.

    Weights are sharded along the mesh's last axis; with several replicas there is an axis of them before it.
    """
    backend = backends.spelled(device.type)
    if rank.world_size == 1:
        if not dist.is_initialized():  # the other role of this process may have been here
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    else:
        dist.init_process_group(
            backend,
            init_method=f"tcp://{rank.master}",
            rank=rank.rank,
            world_size=rank.world_size,
            timeout=timedelta(seconds=timeout_s),
        )
    if num_replicas == 1:
        return init_device_mesh(device.type, (rank.world_size,), mesh_dim_names=("shard",))
    shape = (num_replicas, rank.world_size // num_replicas)
    return init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard"))


def join_context(rank: Rank, device: torch.device, size: int) -> ContextGroup | None:
    """The group of ``size`` consecutive ranks that share samples with this one; None when it has its own.  Collective.

    Weights are sharded over all ranks alike, whoever shares samples with whom.
    """
    if size == 1:
        return None
    mesh = init_device_mesh(device.type, (rank.world_size // size, size), mesh_dim_names=("data", "context"))
    return ContextGroup(mesh.get_group("context"))


def shard(
    root: nn.Module, layers: Iterable[nn.Module], mesh: DeviceMesh, compute_dtype: torch.dtype, *, offloads: bool
) -> None:
    """Shard ``layers`` one by one and the rest of ``root`` as one unit.

    Weights are kept in fp32 and used in ``compute_dtype``; gradients are averaged over ranks in fp32.  ``offloads``
    keeps both in host memory between their uses.
    """
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32)
    offload = CPUOffloadPolicy(pin_memory=mesh.device_type != "cpu") if offloads else OffloadPolicy()
    for module in (*layers, root):
        fully_shard(module, mesh=mesh, mp_policy=policy, offload_policy=offload)


@torch.no_grad()  # type: ignore[untyped-decorator]
def receive_weights(
    root: nn.Module, full: Mapping[str, torch.Tensor], device: torch.device, storage: torch.device
) -> None:
    """Give ``root``, sharded while it had no storage, the weights of rank 0.

    ``full`` holds rank 0's parameters and buffers; on the other ranks only its names and shapes count.  They travel on
    ``device`` and stay in ``storage``, buffers on ``device``.  Collective.
    """
    root.to_empty(device=storage)
    for module in root.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
    for name, tensor in [*root.named_parameters(), *root.named_buffers()]:
        source = full[name].to(device) if not full[name].is_meta else torch.empty_like(full[name], device=device)
        if isinstance(tensor, DTensor):
            part = distribute_tensor(source, tensor.device_mesh, tensor.placements, src_data_rank=0)
            tensor.to_local().copy_(part.to_local())
        else:
            dist.broadcast(source, src=0)
            tensor.copy_(source)
