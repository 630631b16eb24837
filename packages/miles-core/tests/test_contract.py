from miles.core import contract
from miles.core.config.group import Group
from miles.core.types import DynamicFilterOutput


class Mine(Group):
    title = "Mine"

    mine_weight: float = 1.0
    """Weight."""


class Undocumented(Group):
    title = "Undocumented"

    mine_depth: int = 1


class Taken(Group):
    title = "Taken"

    lr: float = 1.0
    """Weight."""


def test_a_good_group_passes_and_bad_ones_do_not():
    assert contract.check_groups([Mine]) == []
    assert "no docstring" in contract.check_groups([Undocumented])[0]
    assert "declared twice" in contract.check_groups([Taken])[0]


async def _async_reward(args, sample, **kwargs):
    return 0.5


def test_rewards_of_both_kinds_pass():
    assert contract.check_reward(lambda args, sample, **kwargs: 1.0) == []
    assert contract.check_reward(lambda args, sample, **kwargs: {"score": 1.0}) == []
    assert contract.check_reward(_async_reward) == []


def test_rewards_that_cannot_work_are_told_why():
    assert "raised TypeError" in contract.check_reward(lambda sample: 1.0)[0]
    assert "returned nan" in contract.check_reward(lambda args, sample: float("nan"))[0]
    assert "returned True" in contract.check_reward(lambda args, sample: True)[0]


def test_a_reward_that_changes_the_sample_is_told_so():
    def meddling(args, sample):
        sample.response = ""
        return 1.0

    assert "changed the sample" in contract.check_reward(meddling)[0]


def test_filters_must_say_why_they_drop():
    assert contract.check_filter(lambda args, group: True) == []
    assert contract.check_filter(lambda args, group: DynamicFilterOutput(False, "dull")) == []
    assert "without a reason" in contract.check_filter(lambda args, group: DynamicFilterOutput(False))[0]
    assert "returned None" in contract.check_filter(lambda args, group: None)[0]


def test_a_distribution_that_is_not_there_is_told_so():
    assert "not installed" in contract.check_distribution("no-such-thing")[0]


def test_our_own_distribution_passes():
    problems = contract.check_distribution("miles-core")
    assert [problem for problem in problems if "needs 'wandb', which is not installed" not in problem] == []
