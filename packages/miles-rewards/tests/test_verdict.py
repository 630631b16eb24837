from miles.core.protocols.reward import RewardOutcome
from miles.rewards.verdict import Verdict, outcome_of


def test_an_outcome_has_every_entry_of_its_kind():
    assert outcome_of(Verdict(1.0, "correct"), 0.5, 0.0) == RewardOutcome(1.0, "correct", seconds=0.5)
    assert outcome_of(Verdict({"acc": 1.0}, "correct"), 0.5, 0.0) == RewardOutcome({"acc": 1.0}, "correct", seconds=0.5)
