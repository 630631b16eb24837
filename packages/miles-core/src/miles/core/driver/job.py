"""A run: its directory, its roles, and what the loop does with them."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from miles.core.driver import checkpoint
from miles.core.driver.ahead import Ahead
from miles.core.driver.background import Background
from miles.core.driver.executor import ActorGroup, Executor, create
from miles.core.driver.export import replaced
from miles.core.driver.periodic import Schedule
from miles.core.driver.progress import watched
from miles.core.driver.resume import Start
from miles.core.driver.saving import Saver
from miles.core.driver.timings import Timings
from miles.core.driver.turns import MemoryTurns, Offloading
from miles.core.driver.weight_supply import WeightSupply, repeats_weights
from miles.core.errors import ConfigError
from miles.core.flags.checkpoint import Checkpoint
from miles.core.flags.cluster import Cluster
from miles.core.flags.data import Data
from miles.core.flags.debug import Debug
from miles.core.flags.training import Training
from miles.core.protocols.backend import TrainReport
from miles.core.protocols.rollout import RolloutResult, RolloutRole
from miles.core.run_directory import RunDirectory
from miles.core.tracking.trackers import Trackers

if TYPE_CHECKING:
    from miles.core.config import Config


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
        self._turns: MemoryTurns | None = None
        self._supply: WeightSupply | None = None
        flags = config[Checkpoint]
        self._saver = Saver(
            run_dir.path,
            lambda: self.actors.finish_save(),
            keep=flags.save_keep_last,
            in_background=flags.async_save,
        )
        self._ahead = Ahead()
        self._evaluation: _Evaluation | None = None
        self._timings = Timings()
        self._sync_metrics: dict[str, float] = {}
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

    @property
    def supply(self) -> WeightSupply:
        assert self._supply is not None, "this run has no trainer"
        return self._supply

    def remaining_rollouts(self) -> Iterator[int]:
        """Ids of the rollouts still to be trained on."""
        yield from range(self._start_at.first_rollout, self.num_rollout)

    def update_weights_if_due(self, version: int) -> None:
        """Bring every engine to the trainer's weights.  What is being made with the old ones is waited for."""
        first = version == self._start_at.first_rollout
        if first or self._schedule.updates_weights(version):
            self.settle()
            self._update_weights(version)

    def _update_weights(self, version: int) -> None:
        if not self._has_engines:
            return
        with self._phase("update_weights", f"engines to take weight version {version}"):
            report = self.supply.update(version)
        if report is not None:
            self._timings.replace({f"update_weights_{name}": seconds for name, seconds in report.timings.items()})
            self._sync_metrics = report.metrics()

    def evaluate_if_due(self, done: int) -> None:
        """Evaluate the policy that ``done`` rollouts have trained, or begin to (``--eval-async``)."""
        if not self._schedule.evaluates(done):
            return
        if self._config.eval_async:
            self._evaluation = _Evaluation(done, Background(lambda: self.rollout.evaluate(done), name=f"eval-{done}"))
        else:
            self._log_evaluation(done, lambda: self.rollout.evaluate(done))

    def generate(self, rollout_id: int) -> RolloutResult:
        """The samples of one rollout: what was generated ahead, or made now."""
        if self._ahead.holds(rollout_id):
            self._wait_ahead()
            return self._ahead.take()
        with self._phase("rollout", f"rollout {rollout_id}", self.rollout.progress):
            return self.rollout.generate(rollout_id)

    def generate_ahead(self, rollout_id: int) -> None:
        """In asynchronous training, begin the next rollout with the weights that the engines have now."""
        if self._generates_ahead and rollout_id < self.num_rollout:
            self._ahead.begin(rollout_id, self.rollout.generate)

    def settle(self) -> None:
        """Wait for what runs beside the loop: the rollout ahead, and an evaluation, which is logged."""
        self._wait_ahead()
        self._finish_evaluation()

    def _wait_ahead(self) -> None:
        if self._ahead.running():
            with self._phase("rollout_wait", "the next rollout", self.rollout.progress):
                self._ahead.wait()
        self._ahead.wait()

    def _finish_evaluation(self) -> None:
        evaluation, self._evaluation = self._evaluation, None
        if evaluation is not None:
            self._log_evaluation(evaluation.done, evaluation.call.result)

    def _log_evaluation(self, done: int, evaluate: Callable[[], dict[str, float]]) -> None:
        with self._phase("eval", f"evaluation after {done} rollouts", self.rollout.progress):
            metrics = evaluate()
        self._trackers.log(metrics, step=done, kind="eval", rollout_id=done)

    def train(self, rollout: RolloutResult) -> TrainReport:
        """Train on them."""
        rollout_id = rollout.batch.rollout_id
        with self.supply.trainer(becomes=rollout_id + 1), self._phase("train", f"training on rollout {rollout_id}"):
            return self.actors.train(rollout.batch)

    def record(self, rollout_id: int, rollout: RolloutResult, report: TrainReport | None) -> None:
        """Log one iteration."""
        metrics = dict(rollout.metrics)
        if report is not None:
            metrics |= report.metrics
            self._timings.replace(report.timings)
        if self._turns is not None:
            metrics |= self._turns.metrics()
        metrics |= self._sync_metrics | self._end_iteration()
        self._sync_metrics = {}
        steps = report.steps if report is not None else ()
        for step_metrics in steps:
            self._trackers.log(step_metrics, step=self._train_steps, kind="train", rollout_id=rollout_id)
            self._train_steps += 1
        self._trackers.log(metrics, step=rollout_id, kind="rollout", rollout_id=rollout_id)

    def save_if_due(self, done: int) -> None:
        """Write a checkpoint, and the Hugging Face export if one is wanted; or begin to (``--async-save``)."""
        self._saver.check()
        if not self._schedule.saves_after(done):
            return
        self.settle()
        state = checkpoint.DriverState(
            rollout_id=done - 1, metrics_offset=self._trackers.offset(), train_steps=self._train_steps
        )
        with self._phase("save_model", f"checkpoint of rollout {done - 1}"), self.supply.trainer():
            if pattern := self._config[Checkpoint].save_hf:
                self._export(Path(pattern.format(rollout_id=done - 1)))
            self._saver.save(state, self._fill)

    def _fill(self, partial: checkpoint.Checkpoint) -> None:
        self.actors.save(partial.actor)
        self.rollout.save(partial.rollout)
        self._ahead.save(partial.path)

    def _end_iteration(self) -> dict[str, float]:
        """Seconds of every phase since the last iteration, and how much of it the trainer stood still."""
        now = time.perf_counter()
        step, self._iteration_start = now - self._iteration_start, now
        timings = self._timings.take() | {"step": step}
        found = {f"perf/{name}_time": seconds for name, seconds in timings.items()}
        if "train" in timings:
            wait = step - timings["train"]
            found |= {"perf/train_wait_time": wait, "perf/wait_time_ratio": wait / step}
        return found

    def _export(self, directory: Path) -> None:
        with replaced(directory) as fresh:
            self.actors.save_hf(fresh)

    def _start(self) -> None:
        config, run_dir = self._config, self._run_dir.path
        checkpoint.remove_partial(run_dir)  # of a life that was killed: this one may need the room
        self._executor = create(config)
        with self._phase("start", "engines and model to start"):
            self._rollout = self._executor.rollout(config, run_dir)
            per_epoch = self._rollout.num_rollouts_per_epoch()
            self.num_rollout = _num_rollout(config[Data], per_epoch)
            self._start_at.check_length(self.num_rollout)
            self._rollout.launch()
            if config[Cluster].offload_rollout:
                self._rollout.wait_ready()
            if not config[Debug].debug_rollout_only:
                counted = config.with_value("num_rollout", self.num_rollout, "--num-epoch times rollouts per epoch")
                self._actors = self._executor.actors(counted, run_dir)
                self._turns = MemoryTurns(self._rollout, self._actors, Offloading.of(config), self._phase)
                self._turns.for_building()
                self._actors.start()
            if self._start_at.checkpoint is not None:
                self._restore(self._start_at.checkpoint)
            if not config[Cluster].offload_rollout:
                self._rollout.wait_ready()
            self._has_engines = bool(self._rollout.engine_urls())
            if self._actors is not None:
                self._supply = _weight_supply(config, self._rollout, self._actors, self._turns)
                self._supply.start()
        self._train_steps = self._start_at.train_steps(config[Data].num_steps_per_rollout or 1)
        self._generates_ahead = config[Training].async_training and not self._rollout.generates_continuously()
        self._schedule = _schedule(config, self.num_rollout, per_epoch)
        gc.collect()
        gc.freeze()  # models and data sets live as long as the run: a full collection need not walk through them

    def _restore(self, found: checkpoint.Checkpoint) -> None:
        if self._actors is not None:
            self._actors.load(found.actor)
        self.rollout.load(found.rollout)
        self._ahead.load(found.path)

    @contextmanager
    def _phase(self, name: str, waiting_for: str, progress: Callable[[], str | None] | None = None) -> Iterator[None]:
        self._trackers.waiting(waiting_for)
        watching = self._watched(progress, waiting_for) if progress is not None else nullcontext()
        with self._timings.phase(name), watching:
            yield

    def _watched(self, progress: Callable[[], str | None], waiting_for: str) -> AbstractContextManager[None]:
        return watched(progress, lambda how_far: self._trackers.waiting(f"{waiting_for}: {how_far}"))

    def _close(self, reason: BaseException | None) -> None:
        """End roles before the executor that carries them.

        An error in one does not spare the others, and does not hide the ``reason`` for which the run ends.
        """
        closers = [self._saver.wait]
        closers += [supply.stop for supply in (self._supply,) if supply is not None]
        closers += [role.close for role in (self._actors,) if role is not None]
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


@dataclass(frozen=True, slots=True)
class _Evaluation:
    """One that has begun."""

    done: int
    call: Background[dict[str, float]]


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


def _weight_supply(config: Config, rollout: RolloutRole, actors: ActorGroup, turns: MemoryTurns | None) -> WeightSupply:
    heartbeat_s = config.rollout_health_check_interval + config.rollout_health_check_timeout
    return WeightSupply(
        rollout,
        actors,
        turns,
        replaces=config.use_fault_tolerance,
        repeats=repeats_weights(config),
        notice_s=heartbeat_s,
    )


def _schedule(config: Config, num_rollout: int, per_epoch: int | None) -> Schedule:
    counted_in_epochs = config[Data].num_rollout is None
    return Schedule(
        num_rollout=num_rollout,
        per_epoch=per_epoch if counted_in_epochs else None,
        eval_interval=config.eval_interval,
        eval_before_train=not config.skip_eval_before_train,
        save_interval=config[Checkpoint].save_interval,
        saves=config[Checkpoint].save is not None,
        update_interval=config[Training].update_weights_interval,
    )
