"""Where a rank computes, and the modules it builds there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar

import torch
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedModel

from miles.core.flags.algorithm import Algorithm
from miles.core.flags.cluster import Cluster
from miles.core.flags.data import Data
from miles.core.flags.lora import Lora
from miles.core.flags.training import Training
from miles.core.protocols.backend import Rank
from miles.core.training.context import ContextGroup
from miles.core.weights.adapters import LoraSpec
from miles.fsdp.attention import kernel_name
from miles.fsdp.flags import Fsdp
from miles.fsdp.fused_layer import fuse_layers
from miles.fsdp.layout import Layout, Packed, Padded
from miles.fsdp.loading import decoder_layers, empty_model, load_model, recompute_layers
from miles.fsdp.lora import add_adapters
from miles.fsdp.policy import PACKED, PolicyModule, RankModule
from miles.fsdp.sharding import Backends, join_context, join_group, receive_weights, shard
from miles.fsdp.value import ValueModule
from miles.fsdp.verification import verify_packing

if TYPE_CHECKING:
    from miles.core.config import Config

M = TypeVar("M", bound=RankModule)
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, slots=True)
class Site:
    """A rank's device and precision.

    Without a mesh the model is used as it is: one rank, in the precision of its weights.
    """

    rank: Rank
    device: torch.device
    compute_dtype: torch.dtype
    mesh: DeviceMesh | None
    context: ContextGroup | None = None
    """The ranks that share samples with this one."""
    offloads: bool = False
    """Whether weights, gradients and optimizer stay in host memory."""

    @classmethod
    def join(cls, config: Config, rank: Rank) -> Site:
        """Take the device and, when weights are sharded or converted, enter the process group."""
        training, cluster = config[Training], config[Cluster]
        device = torch.device(training.device, rank.local_rank if training.device == "cuda" else None)
        if device.type == "cuda":
            torch.cuda.set_device(device)
            _keep_free(device, training.train_memory_margin_bytes)
        dtype, offloads = _DTYPES[training.train_dtype], config[Fsdp].fsdp_cpu_offload
        if rank.world_size == 1 and dtype == torch.float32 and not offloads:
            return cls(rank, device, dtype, None)
        timeout_s = 60.0 * cluster.distributed_timeout_minutes
        replicas = config[Fsdp].dp_replicate_size
        backends = Backends(cluster.distributed_backend, config[Fsdp].fsdp_cpu_backend)
        mesh = join_group(rank, device, backends, timeout_s, replicas)
        return cls(rank, device, dtype, mesh, join_context(rank, device, training.context_parallel_size), offloads)

    @property
    def storage(self) -> torch.device:
        """Where weights are between their uses."""
        return torch.device("cpu") if self.offloads else self.device


def _keep_free(device: torch.device, margin: int) -> None:
    """Let this process allocate all of the accelerator's memory but ``margin`` bytes."""
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(max(0.0, 1.0 - margin / total), device)


@dataclass(frozen=True, slots=True)
class ModuleBuilder:
    """Builds the actor's module and the reference's alike."""

    site: Site
    attention: str
    temperature: float
    chunk_size: int | None
    gradient_checkpointing: bool
    layout: Layout = PACKED
    lora: LoraSpec | None = None
    """Adapters of the policies that are built; the critic has none."""

    @classmethod
    def of(cls, config: Config, site: Site) -> ModuleBuilder:
        training, fsdp = config[Training], config[Fsdp]
        packed, multiple = training.qkv_format == "thd", config[Data].data_pad_size_multiplier
        return cls(
            site=site,
            attention=kernel_name(fsdp.attn_implementation, packed=packed),
            layout=Packed(multiple) if packed else Padded(multiple),
            temperature=config.rollout_temperature,
            chunk_size=training.log_probs_chunk_size if training.log_probs_chunk_size > 0 else None,
            gradient_checkpointing=fsdp.gradient_checkpointing,
            lora=LoraSpec.of(config[Lora], config[Algorithm].seed),
        )

    def build(self, path: str) -> PolicyModule:
        """The model of the checkpoint at ``path``, on its device, sharded where there is a mesh.  Collective."""
        return self._placed(lambda: self._loaded(path), lambda: self._wrapped(empty_model(path, self.attention)))

    def build_critic(self, path: str, *, seed: int) -> ValueModule:
        """The body of that model under a value head: the one that lies beside it, or a new one.  Collective."""
        return self._placed(
            lambda: self._loaded_critic(path, seed),
            lambda: ValueModule(self._ready(empty_model(path, self.attention)), self.layout),
        )

    def _placed(self, loaded: Callable[[], M], empty: Callable[[], M]) -> M:
        """``loaded``'s weights on this rank's device; where they are sharded, only rank 0 loads them."""
        site = self.site
        if site.mesh is None:
            alone = loaded()
            alone.to(site.device)
            return alone
        source = loaded() if site.rank.rank == 0 else empty()
        module = empty()
        shard(module, decoder_layers(module.lm), site.mesh, site.compute_dtype, offloads=site.offloads)
        receive_weights(module, dict(_tensors(source)), site.device, site.storage)
        return module

    def _loaded(self, path: str) -> PolicyModule:
        module = self._wrapped(load_model(path, self.attention))
        verify_packing(module, path)
        return module

    def _loaded_critic(self, path: str, seed: int) -> ValueModule:
        lm = load_model(path, self.attention, needs_head=False)
        verify_packing(replace(self, lora=None)._wrapped(lm), path)
        module = ValueModule(lm, self.layout)
        module.read_value_head(path, seed)
        return module

    def _wrapped(self, lm: PreTrainedModel) -> PolicyModule:
        if self.lora is not None:
            add_adapters(lm, self.lora)
        return PolicyModule(
            self._ready(lm), temperature=self.temperature, chunk_size=self.chunk_size, layout=self.layout
        )

    def _ready(self, lm: PreTrainedModel) -> PreTrainedModel:
        """The model with its layers computed as this rank does."""
        if self.site.device.type == "cpu" and self.site.compute_dtype == torch.float32:
            fuse_layers(decoder_layers(lm))
        if self.gradient_checkpointing:
            recompute_layers(lm)
        return lm


def _tensors(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()
