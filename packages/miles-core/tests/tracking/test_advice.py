import pytest

from miles.core.tracking import names
from miles.core.tracking.advice import advice
from miles.core.tracking.scoreboard import Scoreboard


@pytest.mark.parametrize(
    ("metrics", "said"),
    [
        ({names.GRAD_NORM: 0.0, names.ALL_ZERO: 1.0}, "nothing is learned: every reward is 0"),
        ({names.GRAD_NORM: 0.0, names.ALL_ZERO: 0.0, names.ALL_ONE: 1.0}, "nothing is learned: every reward is 1"),
        ({names.GRAD_NORM: 0.0, names.NO_ANSWER: 1.0, names.ALL_ZERO: 1.0}, "the grader finds no answer"),
        ({names.GRAD_NORM: 0.0}, "nothing is learned. Look at the samples"),
        ({names.TRUNCATED: 0.95}, "95% of the responses are cut off: --rollout-max-response-len"),
        ({names.REWARD_FAILURES: 0.25}, "25% of the rewards could not be computed"),
        ({names.CLIPPED: 0.5}, "50% of the tokens are clipped"),
        ({names.DISAGREEMENT: 0.2}, "0.2 nats apart per token; `miles diagnose`"),
    ],
)
def test_what_is_suspicious_is_said(metrics, said):
    ((_, text),) = advice(metrics)
    assert said in text


def test_a_healthy_rollout_needs_no_advice():
    healthy = {
        names.GRAD_NORM: 0.4, names.ALL_ZERO: 0.5, names.ALL_ONE: 0.1, names.NO_ANSWER: 0.6, names.TRUNCATED: 0.3,
        names.REWARD_FAILURES: 0.0, names.CLIPPED: 0.02, names.DISAGREEMENT: 0.02,
    }  # fmt: skip
    assert list(advice(healthy)) == []
    assert list(advice({})) == []


def test_a_note_is_written_once_and_only_of_what_lasts():
    board = Scoreboard()
    for rollout_id, truncated in enumerate((1.0, 0.1, 1.0, 0.1, 1.0, 1.0, 1.0, 0.1, 1.0, 1.0)):
        board.add({names.TRUNCATED: truncated}, kind="rollout", rollout_id=rollout_id)
    (note,) = board.notes
    assert note.startswith("after 6 rollouts: 100% of the responses are cut off")
