import queue
import threading

import pytest

from miles.core.driver.progress import watched


def test_new_answers_are_told_once_while_the_block_runs():
    answers = iter([None, "1/3", "1/3", "2/3"])
    told: queue.Queue[str] = queue.Queue()
    with watched(lambda: next(answers, "3/3"), told.put, interval_s=0.001):
        assert [told.get(timeout=60) for _ in range(3)] == ["1/3", "2/3", "3/3"]
    assert told.empty()


def test_question_that_fails_ends_the_watching_only():
    asked = threading.Event()

    def fail() -> str:
        asked.set()
        raise ConnectionError("the other side has ended")

    told: list[str] = []
    with watched(fail, told.append, interval_s=0.001):
        assert asked.wait(10)
    assert told == []


def test_error_of_the_block_is_raised_as_it_is():
    with pytest.raises(KeyError), watched(lambda: None, print):
        raise KeyError("mine")
