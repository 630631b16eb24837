"""``miles-fake``, installed like any plugin, is used by name; its author's own tests are the contract checks."""

from __future__ import annotations

import pytest
from miles_fake.filter import fake_keep_long
from miles_fake.flags import GROUPS, Fake
from miles_fake.reward import fake_length
from miles_fake.tracker import CsvTracker

from miles.core import contract
from miles.core.cli import main
from miles.core.config import Config
from miles.core.registry import Registry


def test_it_keeps_the_contracts():
    assert contract.check_distribution("miles-fake") == []
    assert contract.check_groups(GROUPS) == []
    assert contract.check_reward(fake_length) == []
    assert contract.check_filter(fake_keep_long) == []
    assert contract.check_tracker(CsvTracker) == []


@pytest.mark.parametrize(
    ("group", "name", "target"),
    [
        ("miles.rewards", "fake_length", fake_length),
        ("miles.filters", "fake_keep_long", fake_keep_long),
        ("miles.trackers", "fake_csv", CsvTracker),
    ],
)
def test_its_plugins_are_found_by_name(group, name, target):
    assert name in Registry(group).names()
    assert Registry(group).get(name) is target


def test_its_flag_is_one_of_ours():
    config = Config.from_flags(["--rollout-batch-size", "4", "--fake-target-length", "20"], check=False)
    assert config[Fake].fake_target_length == 20
    assert fake_length(config, contract.example_sample(response="x" * 10)) == 0.5


def test_its_rule_is_checked_with_ours():
    _, problems = Config.examine(["--rollout-batch-size", "4", "--rm-type", "fake_length", "--fake-target-length", "0"])
    assert any(problem.startswith("--fake-target-length 0") for problem in problems)


def test_it_is_listed_with_its_version(capsys):
    assert main(["plugins"]) == 0
    assert "miles-fake 0.1.0" in capsys.readouterr().out


def test_it_can_be_switched_off(monkeypatch):
    monkeypatch.setenv("MILES_DISABLE_PLUGINS", "1")
    assert "fake_length" not in Registry("miles.rewards").names()
