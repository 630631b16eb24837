"""`miles train` and `miles train-async`: from a configuration to a finished run."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from miles.core.driver import announce, loop, off_policy, resume
from miles.core.driver.job import Job
from miles.core.driver.lock import exclusive
from miles.core.driver.signals import ending_signals_raise
from miles.core.driver.verdict import verify_metric
from miles.core.flags.checkpoint import Checkpoint
from miles.core.flags.data import Data
from miles.core.flags.debug import Debug
from miles.core.flags.hooks import Hooks
from miles.core.report import write_report
from miles.core.run_directory import RunDirectory

if TYPE_CHECKING:
    from miles.core.config import Config


def train(config: Config) -> RunDirectory:
    """Run the loop to its end; return the run's directory.

    Continues the run when its directory holds a checkpoint.  However the run ends, every process that was started is
    stopped.
    """
    run_dir = RunDirectory.choose(config[Checkpoint].save, config.train_backend).create()
    with exclusive(run_dir.path), ending_signals_raise():
        _run(config, run_dir)
    return run_dir


def _run(config: Config, run_dir: RunDirectory) -> None:
    start = resume.find(config[Checkpoint], run_dir.path)
    start.check_length(config[Data].num_rollout)
    start.check_debug_data(config[Debug].load_debug_rollout_data, config[Data].num_rollout)
    _say(announce.plan(config, run_dir, start.checkpoint))
    for warning in off_policy.warnings(config):
        _say(f"warning: {warning}")
    for change in announce.changes(run_dir.read_config(), config.record()):
        _say(f"changed since the last start: {change}")
    run_dir.write_config(config.record(), config.origin)
    with Job(config, run_dir, start) as job:
        if config[Debug].debug_rollout_only:
            loop.run_rollout_only(job)
        else:
            loop.run(job)
    verify_metric(run_dir.metrics, config[Hooks])
    _say(f"finished: {write_report(run_dir.path)}")


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
