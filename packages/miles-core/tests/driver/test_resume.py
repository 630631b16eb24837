from pathlib import Path

import pytest

from miles.core.driver import checkpoint, resume
from miles.core.errors import ConfigError
from miles.core.flags.checkpoint import Checkpoint


def flags(load: Path | None) -> Checkpoint:
    return Checkpoint.model_construct(load=None if load is None else str(load))


def write(directory: Path, rollout_id: int) -> None:
    directory.mkdir(exist_ok=True)
    with checkpoint.publish(directory, checkpoint.DriverState(rollout_id, 0)):
        pass


def test_run_without_a_checkpoint_starts_fresh(tmp_path):
    assert resume.find(flags(None), tmp_path) is None
    assert resume.find(flags(tmp_path), tmp_path) is None


def test_run_continues_what_it_has_written(tmp_path):
    write(tmp_path, 4)
    assert resume.find(flags(None), tmp_path).state.rollout_id == 4


def test_load_of_another_run_is_where_a_new_run_starts(tmp_path):
    write(tmp_path / "other", 9)
    assert resume.find(flags(tmp_path / "other"), tmp_path / "mine").state.rollout_id == 9


def test_own_progress_comes_before_the_run_it_started_from(tmp_path):
    write(tmp_path / "other", 9)
    write(tmp_path / "mine", 11)
    assert resume.find(flags(tmp_path / "other"), tmp_path / "mine").state.rollout_id == 11


def test_load_without_a_checkpoint_is_an_error_not_a_fresh_start(tmp_path):
    with pytest.raises(ConfigError, match="nothing to resume from"):
        resume.find(flags(tmp_path / "other"), tmp_path / "mine")
