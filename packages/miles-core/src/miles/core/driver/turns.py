"""Trainer and engines take turns in memory (``--offload-train``, ``--offload-rollout``).

    engines generate | engines release, trainer wakes, trains, saves | engines take their weights' memory, the trainer
    sends, and sleeps | engines take the rest and generate

The trainer is awake while it sends, because its ranks gather what they send in the accelerator's memory; keys and
values of the engines, which are most of what they hold, come back when it sleeps.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

from miles.core.driver.executor import ActorGroup
from miles.core.flags.cluster import Cluster
from miles.core.flags.training import Training
from miles.core.protocols.rollout import RolloutRole

if TYPE_CHECKING:
    from miles.core.config import Config

WEIGHTS = ("weights",)
WORKING_MEMORY = ("kv_cache", "cuda_graph")
"""SGLang's names of the kinds of memory that an engine releases."""
Phase = Callable[[str, str], AbstractContextManager[None]]
"""Times a phase of the loop: the name of the metric, and what is waited for."""


@dataclass(frozen=True, slots=True)
class Offloading:
    """Who gives memory up."""

    trainer: bool = False
    engines: bool = False
    keeps_weights: bool = False
    """Engines keep the weights, because the next update is a change of them."""

    @classmethod
    def of(cls, config: Config) -> Offloading:
        cluster = config[Cluster]
        return cls(
            trainer=bool(cluster.offload_train),
            engines=bool(cluster.offload_rollout),
            keeps_weights=config[Training].update_weight_delta,
        )


class MemoryTurns:
    """Whose turn it is.  Used by who has the trainer, one thread at a time."""

    def __init__(
        self,
        rollout: RolloutRole,
        actors: ActorGroup,
        offloading: Offloading | None = None,
        phase: Phase = lambda _name, _waiting_for: nullcontext(),
    ) -> None:
        self._rollout, self._actors = rollout, actors
        self._offloading = offloading or Offloading()
        self._phase = phase
        self._asleep = False
        self._released: tuple[str, ...] = ()
        self._metrics: dict[str, float] = {}

    def metrics(self) -> dict[str, float]:
        """Bytes that were given up since the last call, as far as engines and accelerators tell."""
        found, self._metrics = self._metrics, {}
        return found

    @property
    def engines_rest(self) -> bool:
        """Whether engines have given memory up."""
        return bool(self._released)

    def for_building(self) -> None:
        """Engines are up and the trainer is not: it is built in the memory that they give up."""
        if self._offloading.engines:
            self._release()

    def for_training(self) -> None:
        """Engines give their memory up, then the trainer takes its own."""
        if self._offloading.engines and not self._released:
            self._release()
        self._wake()

    def for_sending(self) -> None:
        """The trainer has its weights, and engines have memory to take them."""
        self._wake()
        self._resume(tuple(tag for tag in self._released if tag in WEIGHTS))

    def for_generating(self) -> None:
        """The trainer gives its memory up, then engines take what they lack."""
        if self._offloading.trainer and not self._asleep:
            with self._phase("sleep", "the trainer to move to host memory"):
                self._metrics["perf/trainer_offloaded_bytes"] = float(self._actors.offload())
            self._asleep = True
        self._resume(self._released)

    def _release(self) -> None:
        self._released = WORKING_MEMORY if self._offloading.keeps_weights else (*WORKING_MEMORY, *WEIGHTS)
        with self._phase("release_engines", "engines to release their memory"):
            self._metrics["perf/engines_released_bytes"] = float(self._rollout.release_memory(self._released))

    def _resume(self, tags: tuple[str, ...]) -> None:
        if tags:
            with self._phase("resume_engines", "engines to take memory"):
                self._rollout.resume_memory(tags)
            self._released = tuple(tag for tag in self._released if tag not in tags)

    def _wake(self) -> None:
        if self._asleep:
            with self._phase("wake_up", "the trainer to come back from host memory"):
                self._actors.onload()
            self._asleep = False
