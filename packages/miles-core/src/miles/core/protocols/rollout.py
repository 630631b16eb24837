"""The rollout side of a run, as the driver sees it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from miles.core.protocols.engine import EngineHosts
from miles.core.types.batch import RolloutBatch
from miles.core.types.rollout import RolloutFnEvalOutput, RolloutFnTrainOutput
from miles.core.types.sample import Group

if TYPE_CHECKING:
    from miles.core.config import Config


@dataclass(frozen=True, slots=True)
class RolloutResult:
    """One rollout, ready to train on."""

    batch: RolloutBatch
    metrics: dict[str, float] = field(default_factory=dict)
    """``rollout/*`` and ``perf/*`` of the rollout side."""


class RolloutRole(Protocol):
    """Owner of data source, engines, router, rollout functions and rewards."""

    def launch(self) -> None:
        """Start engines and router, and return at once, so that the trainer can start meanwhile."""

    def wait_ready(self) -> None:
        """Return when all engines answer; raise EngineError otherwise."""

    def generates_continuously(self) -> bool:
        """Whether engines are kept busy between two calls of ``generate``, and while weights are updated."""

    def num_rollouts_per_epoch(self) -> int | None:
        """Rollouts in one pass over the prompt data; None without a data set."""

    def generate(self, rollout_id: int) -> RolloutResult:
        """Make one rollout: sample, score, filter, convert; write its samples to ``run_dir/rollouts``."""

    def evaluate(self, rollout_id: int) -> dict[str, float]:
        """Evaluate on every data set; write the samples; return ``eval/*`` metrics."""

    def progress(self) -> str | None:
        """How far the running ``generate`` or ``evaluate`` has come, as ``180/256 samples``; called beside it."""

    def check_alive(self) -> None:
        """EngineError that names the engine or the router that has ended; nothing when all live."""

    def engine_urls(self) -> list[str]:
        """Addresses of the engines that hold the policy's weights, or wait for them."""

    def engines_waiting(self) -> list[str]:
        """Addresses of the engines that were started in place of lost ones and wait for weights."""

    def weights_updating(self) -> None:
        """Called before engines take weights: until ``weights_updated`` their silence is no fault."""

    def weights_updated(self, version: int, urls: Sequence[str]) -> None:
        """Called after an update, with the engines that took ``version``; none of them when it failed.

        They serve from now on.  WeightSyncError when one of them says that it holds something else.
        """

    def release_memory(self, tags: Sequence[str]) -> int:
        """Have every engine give the memory of ``tags`` up (``kv_cache``, ``weights``, ``cuda_graph``).

        Nothing is being generated; until it is back, silence is no fault.  Returns the bytes, as far as engines tell.
        """

    def resume_memory(self, tags: Sequence[str]) -> None:
        """Have the engines that gave it up take the memory of ``tags`` again."""

    def replace_engine(self, url: str, reason: str) -> None:
        """Called when an engine that waits does not take weights."""

    def save(self, directory: Path) -> None:
        """Write data-source position, buffer and everything in flight into the existing, empty ``directory``."""

    def load(self, directory: Path) -> None:
        """Restore what ``save`` wrote."""

    def stop(self) -> None:
        """Stop router, engines, reward processes.  Safe to call twice."""


class RolloutRoleClass(Protocol):
    """What ``miles.roles`` names ``rollout``: a class of ``RolloutRole``."""

    def __call__(self, config: Config, run_dir: Path, hosts: EngineHosts | None = None) -> RolloutRole:
        """The role; without ``hosts`` its engines live on its own machine."""

    def own_engines(self, config: Config) -> Sequence[int]:
        """Indices of the engines that the role will start, each in a place of ``hosts`` of its own."""


class DataSource(Protocol):
    """Source of prompts: ``--data-source-path`` names a class constructed with ``(args)``."""

    def get_samples(self, num_samples: int) -> list[Group]:
        """Exactly ``num_samples`` groups of fresh or recycled samples."""

    def add_samples(self, samples: list[Group]) -> None:
        """Give unfinished groups back."""

    def save(self, rollout_id: int) -> None: ...

    def load(self, rollout_id: int | None = None) -> None: ...


class RolloutFn(Protocol):
    """``--rollout-function-path`` and ``--eval-function-path``."""

    def __call__(
        self, args: Any, rollout_id: int, data_source: DataSource, evaluation: bool = False
    ) -> RolloutFnTrainOutput | RolloutFnEvalOutput: ...
