from typing import Annotated

import pytest

from miles.core.config.discover import build_table, flag_table
from miles.core.config.group import Flag, Group
from miles.core.errors import PluginError


class First(Group):
    title = "First"

    reward_weight: float = 1.0
    """Weight."""


class SameName(Group):
    title = "Same name"

    reward_weight: float = 2.0
    """Weight."""


class SameSpelling(Group):
    title = "Same spelling"

    other: Annotated[float, Flag(spelling="--reward-weight")] = 2.0
    """Weight."""


@pytest.mark.parametrize("rival", [SameName, SameSpelling])
def test_two_owners_of_one_flag_are_refused_and_named(rival):
    with pytest.raises(PluginError, match=r"--reward-weight is declared twice: by First of one and by .* of two"):
        build_table([("one", (First,)), ("two", (rival,))])


def test_a_flag_is_found_by_every_way_to_write_it():
    table = flag_table()
    spec = table.flags["grpo_std_normalization"]
    for name in ("--disable-grpo-std-normalization", "disable_grpo_std_normalization", "grpo_std_normalization"):
        assert table.find(name) is spec
    assert table.find("--nothing-like-it") is None


def test_the_table_lists_core_first():
    assert flag_table().groups[0].__module__.startswith("miles.core.flags")
