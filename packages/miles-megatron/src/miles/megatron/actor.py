"""One rank of the actor on Megatron-Core."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from miles.core.flags.algorithm import Algorithm
from miles.core.flags.checkpoint import Checkpoint
from miles.core.flags.optimizer import Optimizer
from miles.core.flags.training import Training
from miles.core.protocols.backend import Rank, Scores, TrainReport
from miles.core.training.objective_spec import ObjectiveSpec, required_inputs
from miles.core.training.state_files import (
    Counters,
    read_counters,
    read_generators,
    write_counters,
    write_generators,
)
from miles.core.training.trainer import RolloutTrainer
from miles.core.types.batch import Floats, RolloutBatch
from miles.core.weights.hf_directory import copy_companions, save_weights
from miles.megatron import checkpoint
from miles.megatron.building import Blueprint
from miles.megatron.constants import write_hf_config
from miles.megatron.conversion import WeightGatherer
from miles.megatron.flags import Parallelism
from miles.megatron.hooks import log_prob_hook, run_init_hook, train_step_hook
from miles.megatron.optimizer import Updater, with_gradients
from miles.megatron.policy import MegatronPolicy, Passes, TaggedPolicy
from miles.megatron.routing import EngineRouting, FirstPassRouting, Routing
from miles.megatron.site import PipelineRanks, Site
from miles.megatron.tagged_weights import TaggedWeights

if TYPE_CHECKING:
    from miles.core.config import Config

_REFERENCE = "ref"


class MegatronActor:
    """Holds the model, its gradients and optimizer, the tagged weights and the training procedure."""

    def __init__(self, config: Config, rank: Rank) -> None:
        self._checkpoint = config[Checkpoint]
        torch.use_deterministic_algorithms(config[Training].deterministic_mode)
        self._site = Site.join(config, rank)
        run_init_hook(config)
        self._source = Path(self._checkpoint.hf_checkpoint or "")
        self._blueprint = Blueprint.of(config, self._site, self._source)
        self._chunks = self._blueprint.build()
        self._tagged = TaggedWeights(self._chunks)
        self._keep_reference(config)
        self._blueprint.load(self._chunks, self._source)
        optimizer, parallel = config[Optimizer], config[Parallelism]
        wrapped = with_gradients(self._chunks, self._blueprint.transformer, optimizer, parallel)
        self._updater = Updater(optimizer, parallel, wrapped, self._site.dtype)
        head, layout = self._blueprint.head(config), self._site.layout
        self._routing = _routing(config, self._blueprint)
        passes = Passes(wrapped, head, layout, routing=self._routing, before_scoring=log_prob_hook(config, ""))
        scoring = Passes(wrapped, head, layout, before_scoring=log_prob_hook(config, "ref_"))
        self._step_hook = train_step_hook(config)
        self._gatherer = WeightGatherer(self._chunks, self._blueprint.weights)
        self._optimizer_flags = optimizer
        self._ref_update_interval = config[Algorithm].ref_update_interval
        self._trainer = RolloutTrainer(
            config,
            MegatronPolicy(passes, self._updater, self._before_step if self._step_hook is not None else None),
            reference=TaggedPolicy(scoring, self._tagged, _REFERENCE) if _REFERENCE in self._tagged else None,
            ranks=PipelineRanks(),
            device=self._site.device,
        )

    def _keep_reference(self, config: Config) -> None:
        """Keep the reference's weights, if the objective needs them."""
        if required_inputs(ObjectiveSpec.from_flags(config)).ref_logp:
            self._blueprint.load(self._chunks, Path(self._checkpoint.ref_load or self._source))
            self._tagged.keep(_REFERENCE)

    def score(self, batch: RolloutBatch) -> Scores:
        return self._trainer.score(batch)

    def train(self, batch: RolloutBatch) -> TrainReport:
        if isinstance(self._routing, FirstPassRouting):
            self._routing.forget()
        if self._step_hook is not None:
            self._step_hook.begin(batch.rollout_id)
        report = self._trainer.train(batch)
        interval = self._ref_update_interval
        if _REFERENCE in self._tagged and interval is not None and (batch.rollout_id + 1) % interval == 0:
            self._tagged.keep(_REFERENCE)
        return report

    def _before_step(self) -> None:
        assert self._step_hook is not None
        self._step_hook(self._chunks, self._updater.optimizer, self._trainer.schedule)

    def log_probs(self, batch: RolloutBatch) -> tuple[Floats, ...]:
        return self._trainer.log_probs(batch)

    def named_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield from self._gatherer.named_weights(self._site.dtype)

    def save(self, directory: Path) -> None:
        checkpoint.write(directory, self._chunks, None if self._checkpoint.no_save_optim else self._updater)
        if self._follows_policy:
            with self._tagged.swapped_in(_REFERENCE):
                checkpoint.write(_made(directory / _REFERENCE), self._chunks, None)
        write_generators(directory, self._site.rank.rank)
        if self._site.rank.rank == 0:
            write_counters(directory, self._counters())

    def finish_save(self) -> None:
        """``save`` has written everything when it returns."""

    def load(self, directory: Path) -> None:
        counters = read_counters(directory, with_optimizer=not self._checkpoint.no_save_optim)
        if self._follows_policy:
            checkpoint.read(directory / _REFERENCE, self._chunks, None)
            self._tagged.keep(_REFERENCE)
        checkpoint.read(directory, self._chunks, self._updater if counters.has_optimizer else None)
        if not counters.has_optimizer:
            self._updater.reload_weights()
        if counters.world_size == self._site.rank.world_size:
            read_generators(directory, self._site.rank.rank)
        self._trainer.steps_done = counters.steps_done
        self._trainer.schedule = counters.resumed_schedule(self._trainer.schedule, self._optimizer_flags)

    def save_hf(self, directory: Path) -> None:
        weights = self.named_weights()
        if self._site.rank.rank != 0:
            for _ in weights:
                pass
            return
        save_weights(weights, directory)
        write_hf_config(self._source, directory, self._site.dtype)
        copy_companions(self._source, directory)

    def offload(self) -> None:
        if self._site.device.type == "cuda":
            self._updater.offload()

    def onload(self) -> None:
        if self._site.device.type == "cuda":
            self._updater.onload()

    @property
    def _follows_policy(self) -> bool:
        """Whether the reference changes, so that it is part of the state."""
        return _REFERENCE in self._tagged and self._ref_update_interval is not None

    def _counters(self) -> Counters:
        return Counters(
            steps_done=self._trainer.steps_done,
            world_size=self._site.rank.world_size,
            has_optimizer=not self._checkpoint.no_save_optim,
            schedule=asdict(self._trainer.schedule),
        )

    def close(self) -> None:
        self._site.leave()


def _made(directory: Path) -> Path:
    directory.mkdir(exist_ok=True)
    return directory


def _routing(config: Config, blueprint: Blueprint) -> Routing | None:
    """Whose experts routers follow; None: every pass chooses its own."""
    algorithm, transformer = config[Algorithm], blueprint.transformer
    if not algorithm.use_routing_replay or transformer.num_moe_experts is None:
        return None
    if algorithm.use_rollout_routing_replay:
        return EngineRouting(transformer.moe_router_topk, transformer.sequence_parallel)
    return FirstPassRouting()
