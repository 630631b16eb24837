from miles.core.protocols.reward import RewardOutcome
from miles.rewards.totals import Totals


def test_each_category_has_a_count_and_a_histogram_of_its_own():
    totals = Totals()
    for category, seconds in (("correct", 0.0001), ("correct", 0.05), ("timeout", 500.0)):
        totals.add(RewardOutcome(1.0, category, seconds=seconds))
    lines = list(totals.lines())
    assert 'miles_rewards_graded_total{category="correct"} 2' in lines
    assert 'miles_rewards_seconds_bucket{category="correct",le="0.0001"} 1' in lines
    assert 'miles_rewards_seconds_bucket{category="correct",le="0.1"} 2' in lines
    assert 'miles_rewards_seconds_sum{category="correct"} 0.050100' in lines
    assert 'miles_rewards_seconds_bucket{category="timeout",le="120.0"} 0' in lines
    assert 'miles_rewards_seconds_bucket{category="timeout",le="+Inf"} 1' in lines
    assert 'miles_rewards_seconds_count{category="timeout"} 1' in lines


def test_a_category_of_a_users_own_cannot_break_the_text():
    totals = Totals()
    totals.add(RewardOutcome(1.0, 'a "good"\none\\'))
    assert 'miles_rewards_graded_total{category="a \\"good\\"\\none\\\\"} 1' in list(totals.lines())
