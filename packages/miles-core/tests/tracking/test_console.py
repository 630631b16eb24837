import io
import queue

import pytest

from miles.core.tracking import names
from miles.core.tracking.console import ConsoleTracker, choose_view
from miles.core.tracking.jsonl import JsonlTracker
from miles.core.tracking.plain import PlainView, eval_line, rollout_line
from miles.core.tracking.scoreboard import Scoreboard


class Config:
    num_rollout = 80


class Terminal(io.StringIO):
    def isatty(self):
        return True


class LineQueue(io.StringIO):
    """Hands every written line to a queue that a test can wait on."""

    def __init__(self):
        super().__init__()
        self.lines = queue.Queue()

    def write(self, text):
        self.lines.put(text)
        return len(text)


ROLLOUT = {
    names.REWARD: 0.625,
    names.RESPONSE_LENGTH: 23.1,
    names.TOKENS_PER_S: 12310.0,
    names.STEP_TIME: 0.95,
    "perf/rollout_time": 0.52,
}


def test_a_rollout_is_one_line():
    board = Scoreboard(num_rollout=80)
    board.add({names.LOSS: 0.0123}, kind="train", rollout_id=22)
    board.add(ROLLOUT, kind="rollout", rollout_id=22)
    assert rollout_line(board) == (
        "rollout 23/80  reward 0.625  length 23.1  loss 0.0123  12,310 tokens/s  "
        "step 0.95 s (generate 0.52, other 0.43)"
    )


def test_what_looks_wrong_follows_the_line_of_its_rollout(tmp_path, capsys):
    cut = {**ROLLOUT, names.TRUNCATED: 1.0}
    for first in (0, 3):  # started, and continued
        tracker, file = ConsoleTracker(Config(), tmp_path), JsonlTracker(None, tmp_path)
        for rollout_id in range(first, first + 3):
            tracker.log(cut, step=rollout_id, kind="rollout", rollout_id=rollout_id)
            file.log(cut, step=rollout_id, kind="rollout", rollout_id=rollout_id)
        tracker.close()
        file.close()
    lines = capsys.readouterr().out.splitlines()
    (at,) = [at for at, line in enumerate(lines) if line.startswith("note: after 2 rollouts: 100% of the responses")]
    assert lines[at - 1].startswith("rollout 2/80")


def test_an_evaluation_shows_the_first_and_the_last_score():
    board = Scoreboard()
    board.add({"eval/add": 0.05}, kind="eval", rollout_id=0)
    assert eval_line(board) == "eval  add 0.05"
    board.add({"eval/add": 0.75}, kind="eval", rollout_id=80)
    assert eval_line(board) == "eval  add 0.05 -> 0.75"


def test_plain_lines_where_there_is_no_terminal(tmp_path, capsys):
    tracker = ConsoleTracker(Config(), tmp_path)
    tracker.log({names.LOSS: 0.5}, step=0, kind="train", rollout_id=0)
    tracker.log(ROLLOUT, step=0, kind="rollout", rollout_id=0)
    tracker.close()
    tracker.close()
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("rollout 1/80  reward 0.625")


def test_a_continued_run_remembers_its_first_evaluation(tmp_path, capsys):
    journal = JsonlTracker(None, tmp_path)
    journal.log({"eval/add": 0.05}, step=0, kind="eval", rollout_id=0)
    journal.close()
    tracker = ConsoleTracker(Config(), tmp_path)
    tracker.log({"eval/add": 0.75}, step=80, kind="eval", rollout_id=80)
    tracker.close()
    assert capsys.readouterr().out == "eval  add 0.05 -> 0.75\n"


def test_silence_is_broken_by_what_the_run_waits_for():
    board, stream = Scoreboard(), LineQueue()
    board.wait("rollout 3: 12/256 samples")
    view = PlainView(board, stream, heartbeat_s=0.01)
    view.start()
    line = stream.lines.get(timeout=60)
    view.stop()
    assert line.startswith("waiting ")
    assert line.endswith("for rollout 3: 12/256 samples\n")


def test_a_terminal_gets_the_live_view():
    rich = pytest.importorskip("rich.console")
    board = Scoreboard(num_rollout=80)
    board.add({"eval/add": 0.05}, kind="eval", rollout_id=0)
    board.add(ROLLOUT, kind="rollout", rollout_id=22)
    board.wait("rollout 24: 180/256 samples")
    view = choose_view(board, Terminal(), "runs/mine")
    assert type(view).__name__ == "LiveView"
    screen = rich.Console(file=io.StringIO(), width=100)
    screen.print(view.render())
    text = screen.file.getvalue()
    for part in (
        "runs/mine",
        "rollout 23/80",
        "0.625",
        "12,310",
        "generate 0.52",
        "180/256 samples",
        "0.05 at first",
    ):
        assert part in text
