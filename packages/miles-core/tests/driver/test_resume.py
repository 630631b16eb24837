from pathlib import Path

import pytest

from miles.core.driver import checkpoint, resume
from miles.core.driver.resume import Start
from miles.core.errors import ConfigError
from miles.core.flags.checkpoint import Checkpoint


def flags(load: Path | None = None, start: int | None = None) -> Checkpoint:
    return Checkpoint.model_construct(load=None if load is None else str(load), start_rollout_id=start)


def write(directory: Path, rollout_id: int) -> None:
    directory.mkdir(exist_ok=True)
    with checkpoint.publish(directory, checkpoint.DriverState(rollout_id, metrics_offset=100 + rollout_id)):
        pass


def test_run_without_a_checkpoint_starts_fresh(tmp_path):
    assert resume.find(flags(), tmp_path) == Start()
    assert resume.find(flags(tmp_path), tmp_path) == Start()


def test_run_continues_what_it_has_written(tmp_path):
    write(tmp_path, 4)
    start = resume.find(flags(), tmp_path)
    assert start.checkpoint.state.rollout_id == 4
    assert (start.first_rollout, start.metrics_offset) == (5, 104)


def test_load_of_another_run_is_where_a_new_run_starts_with_metrics_of_its_own(tmp_path):
    write(tmp_path / "other", 9)
    start = resume.find(flags(tmp_path / "other"), tmp_path / "mine")
    assert start.checkpoint.state.rollout_id == 9
    assert (start.first_rollout, start.metrics_offset) == (10, 0)


def test_own_progress_comes_before_the_run_it_started_from(tmp_path):
    write(tmp_path / "other", 9)
    write(tmp_path / "mine", 11)
    assert resume.find(flags(tmp_path / "other"), tmp_path / "mine").checkpoint.state.rollout_id == 11


def test_start_rollout_id_says_where_a_run_begins_and_not_where_it_goes_on(tmp_path):
    write(tmp_path / "other", 9)
    assert resume.find(flags(start=3), tmp_path / "mine").first_rollout == 3
    assert resume.find(flags(tmp_path / "other", start=0), tmp_path / "mine").first_rollout == 0
    write(tmp_path / "mine", 5)
    assert resume.find(flags(tmp_path / "other", start=0), tmp_path / "mine").first_rollout == 6


def test_load_without_a_checkpoint_is_an_error_not_a_fresh_start(tmp_path):
    with pytest.raises(ConfigError, match="nothing to resume from"):
        resume.find(flags(tmp_path / "other"), tmp_path / "mine")


def test_run_that_has_gone_further_than_it_is_told_to_is_refused(tmp_path):
    write(tmp_path, 4)
    start = resume.find(flags(), tmp_path)
    start.check_length(5)
    start.check_length(None)
    with pytest.raises(ConfigError, match="--num-rollout 4: the model has been trained on 5 rollouts already"):
        start.check_length(4)


def test_optimizer_steps_go_on_as_they_were_counted(tmp_path):
    tmp_path.joinpath("mine").mkdir()
    state = checkpoint.DriverState(4, metrics_offset=0, train_steps=13)
    with checkpoint.publish(tmp_path / "mine", state):
        pass
    assert resume.find(flags(), tmp_path / "mine").train_steps(2) == 13
    assert resume.find(flags(tmp_path / "mine", start=0), tmp_path / "other").train_steps(2) == 0
    assert Start(first_rollout=3).train_steps(2) == 6


def test_missing_debug_samples_are_found_before_anything_starts(tmp_path):
    pattern = str(tmp_path / "{rollout_id}.jsonl")
    (tmp_path / "3.jsonl").touch()
    Start(first_rollout=3).check_debug_data(pattern, 9)
    Start(first_rollout=4).check_debug_data(pattern, 4)
    Start().check_debug_data(None, 9)
    with pytest.raises(ConfigError, match=r"there is no .*0\.jsonl"):
        Start().check_debug_data(pattern, 9)


@pytest.mark.parametrize("weights", ["hugging face", "release"])
def test_load_of_weights_alone_starts_a_new_run(tmp_path, weights):
    model = tmp_path / "model"
    model.mkdir()
    if weights == "release":
        (model / checkpoint.TRACKER_FILE).write_text("release\n")
    else:
        (model / "config.json").write_text('{"model_type": "qwen3"}')
    assert resume.find(flags(model), tmp_path / "mine") == Start()
    assert resume.find(flags(model, start=3), tmp_path / "mine").first_rollout == 3
    write(tmp_path / "mine", 5)
    assert resume.find(flags(model), tmp_path / "mine").first_rollout == 6


def test_a_run_directory_without_a_checkpoint_is_no_model(tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text('{"lr": {"value": 1.0}}')
    with pytest.raises(ConfigError, match="and no model"):
        resume.find(flags(other), tmp_path / "mine")
