"""One rank of the actor on FSDP2."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from miles.core.errors import CheckpointError
from miles.core.flags.algorithm import Algorithm
from miles.core.flags.checkpoint import Checkpoint
from miles.core.flags.optimizer import Optimizer
from miles.core.flags.training import Training
from miles.core.protocols.backend import Rank, TrainReport
from miles.core.training.objective_spec import ObjectiveSpec, required_inputs
from miles.core.training.ranks import ProcessGroupRanks, SingleRank
from miles.core.training.trainer import RolloutTrainer
from miles.core.types.batch import RolloutBatch
from miles.fsdp import checkpoint, export
from miles.fsdp.building import ModuleBuilder, Site
from miles.fsdp.optimizer import build_optimizer, optimizer_state
from miles.fsdp.policy import FrozenPolicy, Policy

if TYPE_CHECKING:
    from miles.core.config import Config


class FsdpActor:
    """Holds model, optimizer, reference and training procedure."""

    def __init__(self, config: Config, rank: Rank) -> None:
        algorithm, self._checkpoint = config[Algorithm], config[Checkpoint]
        self._optimizer_flags = config[Optimizer]
        torch.manual_seed(algorithm.seed + rank.rank)
        torch.use_deterministic_algorithms(config[Training].deterministic_mode)
        self._site = Site.join(config, rank)
        builder = ModuleBuilder.of(config, self._site)
        self._source = Path(self._checkpoint.hf_checkpoint or "")
        self._policy = self._build_policy(builder)
        self._reference = self._build_reference(builder, config)
        self._ref_update_interval = algorithm.ref_update_interval
        self._trainer = RolloutTrainer(
            config,
            self._policy,
            reference=self._reference,
            ranks=SingleRank() if self._site.mesh is None else ProcessGroupRanks(),
            device=self._site.device,
        )

    def _build_policy(self, builder: ModuleBuilder) -> Policy:
        flags = self._optimizer_flags
        module = builder.build(str(self._source))
        optimizer = build_optimizer(flags, module.parameters())
        return Policy(module, optimizer, num_ranks=self._site.rank.world_size, max_norm=flags.clip_grad)

    def _build_reference(self, builder: ModuleBuilder, config: Config) -> FrozenPolicy | None:
        needs = required_inputs(ObjectiveSpec.from_flags(config))
        if not needs.ref_logp:
            return None
        return FrozenPolicy(builder.build(self._checkpoint.ref_load or str(self._source)))

    def train(self, batch: RolloutBatch) -> TrainReport:
        report = self._trainer.train(batch)
        interval = self._ref_update_interval
        if self._reference is not None and interval is not None and (batch.rollout_id + 1) % interval == 0:
            self._reference.follow(self._policy.module)
        return report

    def named_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        return export.named_weights(self._policy.whole_lm(), self._site.compute_dtype)

    def save(self, directory: Path) -> None:
        checkpoint.write_tensors(directory, self._tensors(with_optimizer=not self._checkpoint.no_save_optim))
        checkpoint.write_generators(directory, self._site.rank.rank)
        if self._site.rank.rank == 0:
            checkpoint.write_counters(directory, self._counters())

    def load(self, directory: Path) -> None:
        counters = checkpoint.read_counters(directory)
        if not counters.has_optimizer and not self._checkpoint.no_save_optim:
            raise CheckpointError(
                f"{directory} was saved with --no-save-optim and has no optimizer state to go on with. "
                "Give --no-save-optim to go on with a fresh optimizer, or start a new run from its Hugging Face export"
            )
        checkpoint.read_tensors(directory, self._tensors(with_optimizer=counters.has_optimizer))
        if counters.world_size == self._site.rank.world_size:
            checkpoint.read_generators(directory, self._site.rank.rank)
        self._trainer.steps_done = counters.steps_done

    def save_hf(self, directory: Path) -> None:
        lm = self._policy.whole_lm()
        weights = export.named_weights(lm, self._site.compute_dtype)
        if self._site.rank.rank != 0:
            for _ in weights:
                pass
            return
        export.save_weights(weights, directory)
        export.save_companions(lm, self._site.compute_dtype, self._source, directory)

    def offload(self) -> None:
        self._move(torch.device("cpu"))

    def onload(self) -> None:
        self._move(self._site.device)

    def close(self) -> None:
        if self._site.mesh is not None and dist.is_initialized():
            dist.destroy_process_group()

    def _tensors(self, *, with_optimizer: bool) -> dict[str, torch.Tensor]:
        """Everything that training changes, by name.  Loading fills these tensors in place."""
        parameters = self._policy.named_parameters()
        tensors: dict[str, torch.Tensor] = {f"model.{name}": parameter for name, parameter in parameters.items()}
        if with_optimizer:
            state = optimizer_state(self._optimizer_flags, self._policy.optimizer, parameters)
            tensors |= {f"optimizer.{name}": tensor for name, tensor in state.items()}
        if self._reference is not None and self._ref_update_interval is not None:
            tensors |= {f"reference.{name}": tensor for name, tensor in self._reference.named_parameters().items()}
        return tensors

    def _counters(self) -> checkpoint.Counters:
        return checkpoint.Counters(
            steps_done=self._trainer.steps_done,
            world_size=self._site.rank.world_size,
            has_optimizer=not self._checkpoint.no_save_optim,
        )

    def _move(self, device: torch.device) -> None:
        if self._site.device.type == "cpu":
            return
        self._policy.move(device)
        if self._reference is not None:
            self._reference.module.to(device)
        torch.cuda.empty_cache()
