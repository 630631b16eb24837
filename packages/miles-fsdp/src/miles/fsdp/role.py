"""What actor and critic have in common on FSDP2: a model being trained, its place, and its state on disk."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from miles.core import environ
from miles.core.flags.algorithm import Algorithm
from miles.core.flags.checkpoint import Checkpoint
from miles.core.flags.optimizer import Optimizer
from miles.core.flags.training import Training
from miles.core.protocols.backend import Rank, Scores, TrainReport
from miles.core.training.critic import CriticTrainer
from miles.core.training.loss_scaling import LossScaler
from miles.core.training.memory import allocated_bytes
from miles.core.training.ranks import ProcessGroupRanks, Ranks, SingleRank
from miles.core.training.state_files import Counters, read_counters, restore_generators, write_progress
from miles.core.training.trainer import RolloutTrainer
from miles.core.training.writing import Writer
from miles.core.types.batch import RolloutBatch
from miles.fsdp import checkpoint
from miles.fsdp.building import ModuleBuilder, Site
from miles.fsdp.optimizer import build_optimizer, optimizer_state
from miles.fsdp.policy import Gradients, RankModule, Trained

if TYPE_CHECKING:
    from miles.core.config import Config


class FsdpRole:
    """One rank of a role.  A subclass builds ``_model`` and ``_trainer``."""

    _model: Trained
    _trainer: RolloutTrainer | CriticTrainer

    def __init__(self, config: Config, rank: Rank) -> None:
        self._checkpoint = config[Checkpoint]
        self._optimizer_flags = config[Optimizer]
        torch.manual_seed(config[Algorithm].seed + rank.rank)
        if config[Training].deterministic_mode:
            environ.make_cublas_deterministic()
        torch.use_deterministic_algorithms(config[Training].deterministic_mode)
        self._site = Site.join(config, rank)
        scaler = LossScaler() if self._site.compute_dtype == torch.float16 else None
        self._gradients = Gradients(rank.world_size, self._optimizer_flags.clip_grad, scaler)
        self._writer = Writer.of_ranks(in_background=self._checkpoint.async_save)
        self._builder = ModuleBuilder.of(config, self._site)
        self._source = Path(self._checkpoint.hf_checkpoint or "")

    def score(self, batch: RolloutBatch) -> Scores:
        return self._trainer.score(batch)

    def train(self, batch: RolloutBatch) -> TrainReport:
        return self._trainer.train(batch)

    def save(self, directory: Path) -> None:
        rank, with_optimizer = self._site.rank, not self._checkpoint.no_save_optim
        checkpoint.write_tensors(self._writer, directory, self._tensors(with_optimizer=with_optimizer))
        write_progress(
            directory, rank, self._trainer.counters(world_size=rank.world_size, has_optimizer=with_optimizer)
        )

    def finish_save(self) -> None:
        self._writer.finish()

    def load(self, directory: Path) -> None:
        counters = read_counters(directory, with_optimizer=not self._checkpoint.no_save_optim)
        self._expect(counters)
        checkpoint.read_tensors(directory, self._tensors(with_optimizer=counters.has_optimizer))
        restore_generators(directory, self._site.rank, counters)
        self._trainer.go_on_from(counters, self._optimizer_flags)

    def offload(self) -> int:
        before = allocated_bytes()
        self._move(torch.device("cpu"))
        return before - allocated_bytes()

    def onload(self) -> None:
        self._move(self._site.device)

    def close(self) -> None:
        try:
            self._writer.finish()
        finally:
            if self._site.mesh is not None and dist.is_initialized():
                dist.destroy_process_group()

    def _ranks(self) -> Ranks:
        return SingleRank() if self._site.mesh is None else ProcessGroupRanks(context=self._site.context)

    def _optimizer(self, module: RankModule) -> torch.optim.Optimizer:
        return build_optimizer(self._optimizer_flags, (p for p in module.parameters() if p.requires_grad))

    def _tensors(self, *, with_optimizer: bool) -> dict[str, torch.Tensor]:
        """Everything that training changes, by name.  Loading fills these tensors in place."""
        parameters = self._model.named_parameters()
        tensors: dict[str, torch.Tensor] = {f"model.{name}": parameter for name, parameter in parameters.items()}
        if with_optimizer:
            state = optimizer_state(self._optimizer_flags, self._model.optimizer, parameters)
            tensors |= {f"optimizer.{name}": tensor for name, tensor in state.items()}
        if self._gradients.scaler is not None:
            tensors |= {f"loss_scaler.{name}": tensor for name, tensor in self._gradients.scaler.state.items()}
        return tensors | self._frozen_tensors()

    def _expect(self, counters: Counters) -> None:
        """Have a place for everything that the state of ``counters`` holds."""

    def _frozen_tensors(self) -> dict[str, torch.Tensor]:
        """What the state holds beside the model being trained."""
        return {}

    def _move(self, device: torch.device) -> None:
        if self._site.device.type == "cpu" or self._site.offloads:
            return
        self._model.move(device)
        self._move_frozen(device)
        torch.cuda.empty_cache()

    def _move_frozen(self, device: torch.device) -> None:
        """Move what is there beside the model being trained."""
