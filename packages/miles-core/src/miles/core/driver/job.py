"""A run: its directory, its roles, and what the loop does with them."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from miles.core.driver import checkpoint
from miles.core.driver.executor import ActorGroup, Executor, create
from miles.core.driver.periodic import Schedule
from miles.core.driver.progress import watched
from miles.core.driver.resume import Start
from miles.core.errors import ConfigError, EngineError
from miles.core.flags.checkpoint import Checkpoint
from miles.core.flags.cluster import Cluster
from miles.core.flags.data import Data
from miles.core.flags.debug import Debug
from miles.core.protocols.backend import TrainReport
from miles.core.protocols.rollout import RolloutResult, RolloutRole
from miles.core.run_directory import RunDirectory
from miles.core.tracking.trackers import Trackers

if TYPE_CHECKING:
    from miles.core.config import Config


DEATH_NOTICE_S = 2.0


class Job:
    """Use as a context manager: whatever was started is ended, however the block is left."""

    num_rollout: int
    """Rollouts of the whole run."""

    def __init__(self, config: Config, run_dir: RunDirectory, start: Start) -> None:
        self._config = config
        self._run_dir = run_dir
        self._start_at = start
        self._trackers = Trackers.open(config, run_dir.path, metrics_offset=start.metrics_offset)
        self._executor: Executor | None = None
        self._rollout: RolloutRole | None = None
        self._actors: ActorGroup | None = None
        self._timings: dict[str, float] = {}
        self._iteration_start = time.perf_counter()

    def __enter__(self) -> Job:
        try:
            self._start()
        except BaseException as error:
            self._close(error)
            raise
        self._iteration_start = time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._close(error)

    @property
    def rollout(self) -> RolloutRole:
        assert self._rollout is not None
        return self._rollout

    @property
    def actors(self) -> ActorGroup:
        assert self._actors is not None, "this run has no trainer"
        return self._actors

    def remaining_rollouts(self) -> Iterator[int]:
        """Ids of the rollouts still to be trained on."""
        yield from range(self._start_at.first_rollout, self.num_rollout)

    def update_weights(self, version: int) -> None:
        """Bring every engine to the trainer's weights."""
        urls = self.rollout.engine_urls()
        if not urls:
            return
        with self._phase("update_weights", f"engines to take weight version {version}"):
            try:
                report = self.actors.update_weights(urls, version)
            except EngineError:
                self._name_the_dead()
                raise
            self.rollout.weights_updated(version)
        self._timings |= {f"update_weights_{name}": seconds for name, seconds in report.timings.items()}

    def evaluate_if_due(self, done: int) -> None:
        """Evaluate the policy that ``done`` rollouts have trained."""
        if not self._schedule.evaluates(done):
            return
        with self._phase("eval", f"evaluation after {done} rollouts", self.rollout.progress):
            metrics = self.rollout.evaluate(done)
        self._trackers.log(metrics, step=done, kind="eval", rollout_id=done)

    def generate(self, rollout_id: int) -> RolloutResult:
        """Make the samples of one rollout."""
        with self._phase("rollout", f"rollout {rollout_id}", self.rollout.progress):
            return self.rollout.generate(rollout_id)

    def train(self, rollout: RolloutResult) -> TrainReport:
        """Train on them."""
        with self._phase("train", f"training on rollout {rollout.batch.rollout_id}"):
            return self.actors.train(rollout.batch)

    def record(self, rollout_id: int, rollout: RolloutResult, report: TrainReport | None) -> None:
        """Log one iteration."""
        metrics = dict(rollout.metrics)
        if report is not None:
            metrics |= report.metrics
            self._timings |= report.timings
        now = time.perf_counter()
        self._timings["step"], self._iteration_start = now - self._iteration_start, now
        metrics |= {f"perf/{name}_time": seconds for name, seconds in self._timings.items()}
        self._timings = {}
        steps = report.steps if report is not None else ()
        for index, step_metrics in enumerate(steps):
            self._trackers.log(
                step_metrics, step=rollout_id * self._steps_per_rollout + index, kind="train", rollout_id=rollout_id
            )
        self._trackers.log(metrics, step=rollout_id, kind="rollout", rollout_id=rollout_id)

    def save_if_due(self, done: int) -> None:
        """Write a checkpoint, and the Hugging Face export if one is wanted."""
        if not self._schedule.saves_after(done):
            return
        state = checkpoint.DriverState(rollout_id=done - 1, metrics_offset=self._trackers.offset())
        with self._phase("save_model", f"checkpoint of rollout {done - 1}"):
            if pattern := self._config[Checkpoint].save_hf:
                self._export(Path(pattern.format(rollout_id=done - 1)))
            with checkpoint.publish(self._run_dir.path, state) as partial:
                self.actors.save(partial.actor)
                self.rollout.save(partial.rollout)

    def _export(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.actors.save_hf(directory)

    def _start(self) -> None:
        config, run_dir = self._config, self._run_dir.path
        self._executor = create(config[Cluster])
        with self._phase("start", "engines and model to start"):
            self._rollout = self._executor.rollout(config, run_dir)
            per_epoch = self._rollout.num_rollouts_per_epoch()
            self.num_rollout = _num_rollout(config[Data], per_epoch)
            self._start_at.check_length(self.num_rollout)
            self._rollout.launch()
            if not config[Debug].debug_rollout_only:
                self._actors = self._executor.actors(config, run_dir)
                self._actors.start()
            if self._start_at.checkpoint is not None:
                self._restore(self._start_at.checkpoint)
            self._rollout.wait_ready()
        self._steps_per_rollout = config[Data].num_steps_per_rollout or 1
        self._schedule = _schedule(config, self.num_rollout, per_epoch)
        gc.collect()
        gc.freeze()  # models and data sets live as long as the run: a full collection need not walk through them

    def _name_the_dead(self) -> None:
        """EngineError if a server has ended, which says more than that it does not answer.

        A process that is killed closes its connections a moment before its owner can know.
        """
        deadline = time.monotonic() + DEATH_NOTICE_S
        while time.monotonic() < deadline:
            self.rollout.check_alive()
            time.sleep(DEATH_NOTICE_S / 20)

    def _restore(self, found: checkpoint.Checkpoint) -> None:
        if self._actors is not None:
            self._actors.load(found.actor)
        self.rollout.load(found.rollout)

    @contextmanager
    def _phase(self, name: str, waiting_for: str, progress: Callable[[], str | None] | None = None) -> Iterator[None]:
        start = time.perf_counter()
        self._trackers.waiting(waiting_for)
        with self._watched(progress, waiting_for) if progress is not None else nullcontext():
            yield
        self._timings[name] = time.perf_counter() - start

    def _watched(self, progress: Callable[[], str | None], waiting_for: str) -> AbstractContextManager[None]:
        return watched(progress, lambda how_far: self._trackers.waiting(f"{waiting_for}: {how_far}"))

    def _close(self, reason: BaseException | None) -> None:
        """End roles before the executor that carries them.

        An error in one does not spare the others, and does not hide the ``reason`` for which the run ends.
        """
        closers = [role.close for role in (self._actors,) if role is not None]
        closers += [role.stop for role in (self._rollout,) if role is not None]
        closers += [executor.shutdown for executor in (self._executor,) if executor is not None]
        errors = []
        for close in [*closers, self._trackers.close]:
            try:
                close()
            except Exception as error:
                errors.append(error)
        if reason is not None:
            for missed in errors:
                reason.add_note(f"While the run was ended: {type(missed).__name__}: {missed}")
        elif errors:
            raise errors[0]


def _num_rollout(data: Data, per_epoch: int | None) -> int:
    if data.num_rollout is not None:
        return data.num_rollout
    if data.num_epoch is None or not per_epoch:
        raise ConfigError(
            f"--num-epoch {data.num_epoch}: the prompt data holds less than one rollout of "
            f"--rollout-batch-size {data.rollout_batch_size} prompts, or there is none. Lower the batch size or give "
            "--num-rollout"
        )
    return data.num_epoch * per_epoch


def _schedule(config: Config, num_rollout: int, per_epoch: int | None) -> Schedule:
    counted_in_epochs = config[Data].num_rollout is None
    return Schedule(
        num_rollout=num_rollout,
        per_epoch=per_epoch if counted_in_epochs else None,
        eval_interval=config.eval_interval,
        eval_before_train=not config.skip_eval_before_train,
        save_interval=config[Checkpoint].save_interval,
        saves=config[Checkpoint].save is not None,
    )
