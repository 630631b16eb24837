import json
import os
import signal
from pathlib import Path

import pytest

from miles.core.driver import checkpoint
from miles.core.driver.checkpoint import DriverState
from miles.core.errors import CheckpointError


def write(directory: Path, rollout_id: int, text: str = "weights") -> None:
    with checkpoint.publish(directory, DriverState(rollout_id=rollout_id, metrics_offset=11)) as partial:
        (partial.actor / "model").mkdir()
        (partial.actor / "model" / "shard").write_text(text)
        (partial.rollout / "state.json").write_text("{}")


def test_published_checkpoint_is_found_with_its_state(tmp_path):
    write(tmp_path, 3)
    found = checkpoint.latest(tmp_path)
    assert found is not None
    assert found.path == tmp_path / "iter_0000003"
    assert found.state == DriverState(rollout_id=3, metrics_offset=11)
    assert (found.actor / "model" / "shard").read_text() == "weights"


def test_directory_without_a_checkpoint_gives_none(tmp_path):
    assert checkpoint.latest(tmp_path) is None


def test_failure_while_writing_leaves_the_previous_checkpoint_in_force(tmp_path):
    write(tmp_path, 3)
    with pytest.raises(OSError, match="disk full"), checkpoint.publish(tmp_path, DriverState(5, 0)):
        raise OSError("disk full")
    assert checkpoint.latest(tmp_path).state.rollout_id == 3


def test_failure_while_writing_gives_the_room_back(tmp_path):
    (tmp_path / ".iter_0000004.partial" / "actor").mkdir(parents=True)  # of a run that was killed
    with pytest.raises(OSError, match="disk full"), checkpoint.publish(tmp_path, DriverState(5, 0)):
        raise OSError("disk full")
    assert list(tmp_path.iterdir()) == []


def test_kill_while_writing_leaves_the_previous_checkpoint_in_force(tmp_path):
    write(tmp_path, 3)
    pid = os.fork()
    if pid == 0:
        with checkpoint.publish(tmp_path, DriverState(5, 0)) as partial:
            (partial.actor / "half").write_text("ha")
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
    assert checkpoint.latest(tmp_path).state.rollout_id == 3
    write(tmp_path, 5)
    assert checkpoint.latest(tmp_path).state.rollout_id == 5


def test_saving_an_iteration_again_replaces_it(tmp_path):
    write(tmp_path, 3, "first")
    write(tmp_path, 3, "second")
    assert (checkpoint.latest(tmp_path).actor / "model" / "shard").read_text() == "second"


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda file: file.write_text("weighty"), "was changed"),
        (lambda file: file.write_text("w"), "has 1 bytes, 7 were written"),
        (lambda file: file.unlink(), "is missing"),
    ],
)
def test_damaged_file_is_named_and_the_previous_checkpoint_offered(tmp_path, damage, words):
    write(tmp_path, 3)
    write(tmp_path, 5)
    damage(tmp_path / "iter_0000005" / "actor" / "model" / "shard")
    with pytest.raises(CheckpointError, match=words) as caught:
        checkpoint.latest(tmp_path)
    assert "shard" in str(caught.value)
    assert "iter_0000003 is whole" in str(caught.value)


def test_missing_manifest_is_an_error_without_an_older_one_to_offer(tmp_path):
    write(tmp_path, 5)
    (tmp_path / "iter_0000005" / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="No older checkpoint"):
        checkpoint.latest(tmp_path)


def test_manifest_that_is_something_else_is_an_error(tmp_path):
    write(tmp_path, 5)
    (tmp_path / "iter_0000005" / "manifest.json").write_text("[]")
    with pytest.raises(CheckpointError, match="no JSON object"):
        checkpoint.latest(tmp_path)


def test_checkpoint_of_a_later_format_is_refused(tmp_path):
    write(tmp_path, 5)
    manifest = tmp_path / "iter_0000005" / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"format": 99}))
    with pytest.raises(CheckpointError, match="format is 99"):
        checkpoint.latest(tmp_path)


def test_tracker_that_is_no_number_is_an_error(tmp_path):
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("release")
    with pytest.raises(CheckpointError, match="'release'"):
        checkpoint.latest(tmp_path)


def test_only_the_last_checkpoints_are_kept(tmp_path):
    for rollout_id in (1, 2, 3):
        with checkpoint.publish(tmp_path, DriverState(rollout_id, 0), keep=2) as partial:
            (partial.actor / "shard").write_text("weights")
    assert sorted(path.name for path in tmp_path.glob("iter_*")) == ["iter_0000002", "iter_0000003"]
    assert list(tmp_path.glob(".*")) == []


def test_checkpoints_of_a_longer_life_do_not_push_out_the_one_just_written(tmp_path):
    for rollout_id in (1, 8, 9):
        write(tmp_path, rollout_id)
    with checkpoint.publish(tmp_path, DriverState(2, 0), keep=1) as partial:
        (partial.actor / "shard").write_text("weights")
    assert checkpoint.latest(tmp_path).state.rollout_id == 2
    assert not (tmp_path / "iter_0000001").exists()


def test_a_broken_checkpoint_is_skipped_where_that_is_wanted(tmp_path, caplog):
    for rollout_id in (1, 2, 3):
        write(tmp_path, rollout_id)
    (tmp_path / "iter_0000003" / "manifest.json").write_text("{")
    (tmp_path / "iter_0000002" / "actor" / "model" / "shard").write_text("weightz")
    assert checkpoint.latest(tmp_path, skip_broken=True).state.rollout_id == 1
    assert "iter_0000003 is unusable" in caplog.text


@pytest.mark.parametrize("text", ["", "seven", "9"])
def test_a_torn_name_of_the_latest_checkpoint_does_not_hide_the_others(tmp_path, text):
    write(tmp_path, 3)
    (tmp_path / checkpoint.TRACKER_FILE).write_text(text)
    with pytest.raises(CheckpointError, match="iter_0000003 is whole"):
        checkpoint.latest(tmp_path)
    assert checkpoint.latest(tmp_path, skip_broken=True).state.rollout_id == 3


@pytest.mark.parametrize("cut", ["", "1", "10"])
def test_a_number_that_was_cut_short_does_not_name_an_older_checkpoint(tmp_path, cut):
    for rollout_id in (1, 10, 103):
        write(tmp_path, rollout_id)
    (tmp_path / checkpoint.TRACKER_FILE).write_text(cut)
    with pytest.raises(CheckpointError, match=r"iter_0000103 is whole"):
        checkpoint.latest(tmp_path)
    assert checkpoint.latest(tmp_path, skip_broken=True).state.rollout_id == 103


@pytest.mark.parametrize("text", ["10\n", "103"])
def test_a_number_that_was_written_by_hand_is_taken(tmp_path, text):
    for rollout_id in (10, 103):
        write(tmp_path, rollout_id)
    (tmp_path / checkpoint.TRACKER_FILE).write_text(text)
    assert checkpoint.latest(tmp_path).state.rollout_id == int(text)


def test_who_outlives_a_killed_run_does_not_write_into_the_next_ones_checkpoint(tmp_path):
    left = checkpoint.begin(tmp_path, DriverState(3, 0))
    fresh = checkpoint.begin(tmp_path, DriverState(3, 0))
    assert left.path != fresh.path
    assert not left.path.exists()


def test_every_file_of_a_checkpoint_that_is_cut_short_is_noticed(tmp_path):
    write(tmp_path, 1)
    write(tmp_path, 2)
    for path in [path for path in (tmp_path / "iter_0000002").rglob("*") if path.is_file()]:
        whole = path.read_bytes()
        for length in {0, len(whole) // 2, len(whole) - 1}:
            path.write_bytes(whole[:length])
            with pytest.raises(CheckpointError, match=path.name):
                checkpoint.latest(tmp_path)
            assert checkpoint.latest(tmp_path, skip_broken=True).state.rollout_id == 1
        path.write_bytes(whole)
    assert checkpoint.latest(tmp_path).state.rollout_id == 2
