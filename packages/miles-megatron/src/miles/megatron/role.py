"""What actor and critic have in common on Megatron-Core: a model being trained, its place, and its state on disk."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from miles.core.flags.checkpoint import Checkpoint
from miles.core.flags.optimizer import Optimizer
from miles.core.flags.training import Training
from miles.core.protocols.backend import Rank, Scores, TrainReport
from miles.core.training.critic import CriticTrainer
from miles.core.training.state_files import Counters, read_counters, restore_generators, write_progress
from miles.core.training.trainer import RolloutTrainer
from miles.core.training.writing import Writer
from miles.core.types.batch import RolloutBatch
from miles.core.weights.hf_directory import copy_companions, save_weights
from miles.megatron import checkpoint
from miles.megatron.building import Blueprint
from miles.megatron.constants import write_hf_config
from miles.megatron.conversion import WeightGatherer
from miles.megatron.flags import Megatron, Parallelism
from miles.megatron.hooks import run_init_hook
from miles.megatron.language_model import LanguageModel
from miles.megatron.optimizer import Updater, with_gradients
from miles.megatron.resting import RestingMemory
from miles.megatron.site import Site

if TYPE_CHECKING:
    from megatron.core.distributed import DistributedDataParallel
    from miles.core.config import Config

_LOG = logging.getLogger(__name__)


class MegatronRole:
    """One rank of a role.  A subclass fills the model with weights, calls ``_ready`` and builds ``_trainer``."""

    _trainer: RolloutTrainer | CriticTrainer
    _blueprint: Blueprint
    _chunks: list[LanguageModel]
    _updater: Updater

    def __init__(self, config: Config, rank: Rank) -> None:
        self._config = config
        self._checkpoint = config[Checkpoint]
        self._optimizer_flags = config[Optimizer]
        torch.use_deterministic_algorithms(config[Training].deterministic_mode)
        self._site = Site.join(config, rank)
        if rank.rank == 0 and config[Megatron].megatron_to_hf_mode == "bridge":
            _LOG.warning("--megatron-to-hf-mode bridge: Miles' own tables convert weights; Megatron-Bridge is not used")
        self._resting = RestingMemory()
        self._writer = Writer.of_ranks(in_background=self._checkpoint.async_save)
        run_init_hook(config)
        self._source = Path(self._checkpoint.hf_checkpoint or "")

    def _ready(self) -> list[DistributedDataParallel]:
        """The chunks with buffers for gradients and an optimizer of their own, which takes the weights they have."""
        parallel = self._config[Parallelism]
        wrapped = with_gradients(self._chunks, self._blueprint.transformer, self._optimizer_flags, parallel)
        self._updater = Updater(self._optimizer_flags, parallel, wrapped, self._site.dtype)
        if self._updater.scaler is not None:
            self._blueprint.transformer.grad_scale_func = self._updater.scaled
        self._gatherer = WeightGatherer(self._chunks, self._blueprint.weights)
        return wrapped

    def score(self, batch: RolloutBatch) -> Scores:
        return self._trainer.score(batch)

    def train(self, batch: RolloutBatch) -> TrainReport:
        report = self._trainer.train(batch)
        self._updater.settle()
        return report

    def save(self, directory: Path) -> None:
        rank, writer, with_optimizer = self._site.rank, self._writer, not self._checkpoint.no_save_optim
        writer.finish()
        updater = self._updater if with_optimizer else None
        own = checkpoint.prepare(directory, self._chunks, updater, writer, copies=writer.in_background)
        parts = [own, *self._prepare_tagged(directory)]
        writer.write(lambda: _all(parts))
        write_progress(
            directory, rank, self._trainer.counters(world_size=rank.world_size, has_optimizer=with_optimizer)
        )

    def finish_save(self) -> None:
        self._writer.finish()

    def load(self, directory: Path) -> None:
        counters = read_counters(directory, with_optimizer=not self._checkpoint.no_save_optim)
        self._load_tagged(directory, counters)
        checkpoint.read(directory, self._chunks, self._updater if counters.has_optimizer else None)
        if not counters.has_optimizer:
            self._updater.reload_weights()
        restore_generators(directory, self._site.rank, counters)
        self._trainer.go_on_from(counters, self._optimizer_flags)

    def save_hf(self, directory: Path) -> None:
        weights = self._gatherer.named_weights(self._site.dtype)
        if self._site.rank.rank != 0:
            for _ in weights:
                pass
            return
        save_weights(self._exported(weights, directory), directory)
        write_hf_config(self._source, directory, self._site.dtype)
        copy_companions(self._source, directory)

    def offload(self) -> int:
        weights = (tensor for chunk in self._chunks for tensor in (*chunk.parameters(), *chunk.buffers()))
        return self._resting.take((*weights, *self._updater.state_tensors()), zeros=self._updater.gradients())

    def onload(self) -> None:
        self._resting.give_back()

    def close(self) -> None:
        try:
            self._writer.finish()
        finally:
            self._site.leave()

    def _exported(
        self, weights: Iterator[tuple[str, torch.Tensor]], directory: Path
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Those of ``weights`` that belong to the model that transformers loads."""
        return weights

    def _prepare_tagged(self, directory: Path) -> list[Callable[[], None]]:
        """What writes the weights that are part of the state beside those being trained."""
        return []

    def _load_tagged(self, directory: Path, counters: Counters) -> None:
        """Read what ``_prepare_tagged`` wrote.  The model's own weights are read afterwards."""


def _all(calls: Sequence[Callable[[], None]]) -> None:
    for call in calls:
        call()
