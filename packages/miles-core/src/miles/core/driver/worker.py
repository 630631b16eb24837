"""One rank of the actor or of the critic, wherever it runs: in the driver's process or in a Ray actor."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch

from miles.core.driver.watchdog import Watchdog, watched
from miles.core.driver.weight_supply import repeats_weights
from miles.core.flags.cluster import Cluster
from miles.core.flags.debug import Debug
from miles.core.flags.lora import Lora
from miles.core.flags.training import Training
from miles.core.protocols.backend import Actor, AdapterActor, Learner, Rank, Role, Scores, TrainBackend, TrainReport
from miles.core.registry import Registry
from miles.core.run_directory import RunDirectory
from miles.core.types.batch import RolloutBatch
from miles.core.weights import probe
from miles.core.weights.adapter_form import AdapterForm
from miles.core.weights.adapter_serving import served_form
from miles.core.weights.engine_client import EngineClient
from miles.core.weights.sender import WeightSender
from miles.core.weights.sync import SyncReport

if TYPE_CHECKING:
    from miles.core.config import Config

BACKENDS = Registry("miles.train_backends")


class RoleWorker:
    """A backend's actor or critic, plus the sending side of weight updates."""

    def __init__(self, config: Config, run_dir: Path, role: Role) -> None:
        self._role = role
        self._config = config
        self._training = config[Training]
        self._run_dir = run_dir
        self._learner: Learner | None = None
        self._rank = Rank()
        self._deadline_s = 60.0 * config[Cluster].distributed_timeout_minutes
        self._sender: WeightSender | None = None
        # Engines score prompts at temperature 1, and the trainer at that of sampling; recorded routing is of rollouts.
        comparable = config.rollout_temperature == 1 and not config.use_rollout_routing_replay
        self._probe_interval = self._training.update_weight_probe_interval if comparable else 0
        self._check_equal = config[Debug].check_weight_update_equal
        self._probe: Callable[[], float] | None = None
        """What is left to be asked of the engines after an update."""
        self._num_updates = 0
        self._adapter: AdapterForm | None = None
        self._serving_known = False
        self._watchdog = self._watchdog_of(Rank())

    def _watchdog_of(self, rank: Rank) -> Watchdog:
        name = f"{self._role}-{rank.rank}"
        log = RunDirectory(self._run_dir).log_file(f"watchdog-{name}")
        return Watchdog(f"rank {rank.rank} of the {self._role}", log, self._config[Debug].watchdog_timeout_s)

    def build(self, rank: Rank, num_threads: int) -> None:
        """Build model and optimizer.  ``num_threads`` is this rank's share of the cores."""
        torch.set_num_threads(num_threads)
        backend: TrainBackend = BACKENDS.get(self._training.train_backend)()
        self._rank = rank
        self._watchdog = self._watchdog_of(rank)
        with self._watchdog.watching("building the model"):
            self._learner = backend.create(self._config, rank, self._role)

    @property
    def learner(self) -> Learner:
        assert self._learner is not None, "build() comes first"
        return self._learner

    @property
    def actor(self) -> Actor:
        assert self._role == "actor", "engines generate with the actor"
        return cast(Actor, self.learner)

    @watched
    def score(self, batch: RolloutBatch) -> Scores:
        return self.learner.score(batch)

    @watched
    def train(self, batch: RolloutBatch) -> TrainReport:
        return self.learner.train(batch)

    @watched
    def served_adapter(self, urls: list[str]) -> AdapterForm | None:
        """The adapter that engines add themselves, found at the first update; None: they get whole weights.

        Rank 0 finds it for all: ranks that came to different answers would gather different tensors.
        """
        if not self._serving_known:
            lora = self._config[Lora]
            if lora.lora_rank and lora.lora_serving != "merged":
                facts = {url: EngineClient(url, deadline_s=self._deadline_s).get("/server_info") for url in urls}
                form = cast(AdapterActor, self.actor).adapter_form()
                self._adapter = served_form(self._config, form, facts)
            self._serving_known = True
        return self._adapter

    @watched
    def send_weights(self, urls: list[str], version: int, adapter: AdapterForm | None) -> SyncReport:
        """Push the weights, or the ``adapter`` alone, to the engines at ``urls``: rank 0 sends what all gather."""
        self._adapter = adapter
        return self._gathered(lambda tensors: self._send(tensors, urls, version))

    @watched
    def finish_update(self, urls: list[str], version: int, report: SyncReport) -> SyncReport:
        """Keep and prove what ``send_weights`` has sent, once no rank has failed in that: the ranks compute together.

        ``report`` is rank 0's, and is returned with what this took.
        """
        self._probe = None
        if self._training.keep_old_actor:
            self.actor.keep_weights(version)
        if self._probe_interval and self._num_updates % self._probe_interval == 0:
            with report.phase("probe"):
                self._prepare_probe(urls, report)
        self._num_updates += 1
        if self._num_updates == 1 and self._check_equal:
            with report.phase("check"):
                self._gathered(lambda tensors: self._check(tensors, urls, version))
        return report

    @watched
    def repeat_weights(self, urls: list[str], version: int) -> SyncReport:
        """What ``ActorGroup`` says; of rank 0."""
        assert self._sender is not None, "send_weights() comes first"
        return self._sender.send_again(urls, version)

    @watched
    def probe_engines(self) -> float | None:
        """What ``ActorGroup`` says; rank 0 asks."""
        expected, self._probe = self._probe, None
        return None if expected is None else expected()

    @watched
    def offload(self) -> int:
        """Move this rank to host memory; the bytes of its accelerator that this frees."""
        return self.learner.offload()

    @watched
    def onload(self) -> None:
        """Undo ``offload``."""
        self.learner.onload()

    def _gathered(self, use: Callable[[Iterator[tuple[str, torch.Tensor]]], SyncReport]) -> SyncReport:
        """Gather what engines get with the other ranks; rank 0 uses it."""
        tensors = (
            self.actor.named_weights() if self._adapter is None else cast(AdapterActor, self.actor).named_adapters()
        )
        try:
            return use(tensors) if self._rank.rank == 0 else SyncReport()
        finally:
            if self._rank.world_size > 1:  # also when an engine is lost: the others would wait in the middle for ever
                for _ in tensors:
                    pass

    def _send(self, tensors: Iterator[tuple[str, torch.Tensor]], urls: list[str], version: int) -> SyncReport:
        if self._sender is None:
            self._sender = WeightSender(
                self._training,
                self._run_dir,
                deadline_s=self._deadline_s,
                remembers=repeats_weights(self._config),
            )
        return self._sender.send(tensors, urls, version, self._adapter)

    def _check(self, tensors: Iterator[tuple[str, torch.Tensor]], urls: list[str], version: int) -> SyncReport:
        """Whether an update reaches every tensor of the engines."""
        assert self._sender is not None, "send_weights() comes first"
        self._sender.scramble()
        report = self._send(tensors, urls, version)
        self._sender.compare()
        return report

    def _prepare_probe(self, urls: list[str], report: SyncReport) -> None:
        """Compute the trainer's side; engines are asked when they can generate."""
        trained = self.actor.log_probs(probe.batch(self._rank.world_size))
        if self._rank.rank == 0:
            limit = probe.tolerance(report.dtype)
            self._probe = partial(probe.check, urls, trained[0], report.names, limit=limit)

    @watched
    def save(self, directory: Path) -> None:
        self.learner.save(directory)

    def finish_save(self) -> None:
        self.learner.finish_save()

    @watched
    def load(self, directory: Path) -> None:
        self.learner.load(directory)

    @watched
    def save_hf(self, directory: Path) -> None:
        self.learner.save_hf(directory)

    def close(self) -> None:
        """Leave the group and free buffers.  Safe to call twice."""
        if self._sender is not None:
            self._sender.close()
            self._sender = None
        if self._learner is not None:
            self._learner.close()
            self._learner = None
