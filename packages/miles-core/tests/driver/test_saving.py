import threading
import time

import pytest

from miles.core.driver import checkpoint
from miles.core.driver.checkpoint import DriverState
from miles.core.driver.saving import Saver

DEADLINE_S = 20


def fill(partial):
    (partial.actor / "weights").write_text("new")


def saver(directory, finish=lambda: None, *, in_background=True):
    return Saver(directory, finish, keep=None, in_background=in_background)


def test_a_checkpoint_takes_force_when_everything_is_on_disk(tmp_path):
    written = threading.Event()
    saving = saver(tmp_path, lambda: written.wait(DEADLINE_S))
    saving.save(DriverState(4, 0), fill)
    saving.check()
    assert checkpoint.latest(tmp_path) is None
    written.set()
    saving.wait()
    assert checkpoint.latest(tmp_path).state.rollout_id == 4


def test_the_next_one_waits_for_the_one_before(tmp_path):
    saving = saver(tmp_path)
    for rollout_id in (1, 2):
        saving.save(DriverState(rollout_id, 0), fill)
    saving.wait()
    assert sorted(path.name for path in tmp_path.glob("iter_*")) == ["iter_0000001", "iter_0000002"]


@pytest.mark.parametrize("in_background", [False, True])
def test_what_goes_wrong_is_raised_and_leaves_nothing(tmp_path, in_background):
    def full_disk():
        raise OSError("disk full")

    saving = saver(tmp_path, full_disk, in_background=in_background)

    def save():
        saving.save(DriverState(4, 0), fill)
        saving.wait()

    with pytest.raises(OSError, match="disk full"):
        save()
    assert list(tmp_path.iterdir()) == []
    saving.wait()


def test_a_failure_is_noticed_without_waiting(tmp_path):
    def full_disk():
        raise OSError("disk full")

    saving = saver(tmp_path, full_disk)
    saving.save(DriverState(4, 0), fill)
    while saving._writing is not None and not saving._writing.done():
        time.sleep(0.001)
    with pytest.raises(OSError, match="disk full"):
        saving.check()


def test_without_background_the_checkpoint_is_there_at_once(tmp_path):
    saver(tmp_path, in_background=False).save(DriverState(4, 0), fill)
    assert checkpoint.latest(tmp_path).state.rollout_id == 4
