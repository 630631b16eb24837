import threading

from miles.core.driver.watchdog import Watchdog, watched


def wait_for(path, words, deadline_s=60.0):
    """The file's text, once it holds ``words``."""
    tick, waited = threading.Event(), 0.0
    while waited < deadline_s:
        if path.exists() and words in (text := path.read_text()):
            return text
        tick.wait(0.01)
        waited += 0.01
    raise AssertionError(f"no {words!r} in {path}")


class Rank:
    def __init__(self, log, deadline_s):
        self._watchdog = Watchdog("rank 1 of the actor", log, deadline_s)
        self.log = log

    @watched
    def wait_for_the_others(self):
        """Ends once it was told on."""
        return wait_for(self.log, "in wait_for_the_others")


def test_a_call_that_takes_long_is_told_with_its_stack(tmp_path):
    text = Rank(tmp_path / "logs" / "watchdog.log", 0.02).wait_for_the_others()
    assert "rank 1 of the actor has been at wait_for_the_others() for" in text


def test_a_quick_call_is_not_told(tmp_path):
    with Watchdog("rank 0", tmp_path / "log", 30.0).watching("nothing much"):
        pass
    assert not (tmp_path / "log").exists()
    assert not [thread for thread in threading.enumerate() if thread.name == "watchdog"]


def test_a_deadline_of_zero_watches_nothing(tmp_path):
    with Watchdog("rank 0", tmp_path / "log", 0.0).watching("nothing"):
        assert not [thread for thread in threading.enumerate() if thread.name == "watchdog"]
