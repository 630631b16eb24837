from typing import Annotated, Any

import pytest
from pydantic import Field

from miles.core.config.discover import FlagTable, build_table, flag_table
from miles.core.config.group import Flag, Group
from miles.core.config.parser import parse
from miles.core.flags import GROUPS


class Engine(Group):
    title = "Engine"

    engine_port: int = 0
    """Port."""

    engine_options: Annotated[dict[str, Any], Flag(captures="--engine-")] = Field(default_factory=dict)
    """The rest."""


@pytest.fixture
def table() -> FlagTable:
    return build_table([("acme", (Engine,))])


def test_only_what_was_typed_is_reported():
    assert parse(["--lr", "1e-5", "--colocate"], flag_table()).values == {"lr": "1e-5", "colocate": True}


def test_an_equals_sign_separates_as_well():
    assert parse(["--lr=1e-5"], flag_table()).values == {"lr": "1e-5"}


def test_the_last_of_two_values_wins():
    assert parse(["--lr", "1", "--lr", "2"], flag_table()).values == {"lr": "2"}


def test_negative_numbers_are_values():
    assert parse(["--log-probs-chunk-size", "-1"], flag_table()).values == {"log_probs_chunk_size": "-1"}


def test_switches_can_be_undone():
    assert parse(["--colocate", "--no-colocate"], flag_table()).values == {"colocate": False}
    assert parse(["--disable-grpo-std-normalization"], flag_table()).values == {"grpo_std_normalization": False}


def test_flags_are_not_abbreviated():
    assert "--num-rollou is not a flag" in parse(["--num-rollou", "3"], flag_table()).problems[0]


def test_an_unknown_flag_is_answered_with_the_nearest():
    (problem,) = parse(["--eps-clip-hihg", "0.2"], flag_table()).problems
    assert "Did you mean --eps-clip-high?" in problem


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("--hlep", "--help"),
        ("--seeed", "--seed"),
        ("--batch-size", "--rollout-batch-size or --micro-batch-size or --global-batch-size"),
    ],
)
def test_what_may_have_been_meant_is_named(written, meant):
    (problem,) = parse([written, "1"], build_table([("miles-core", GROUPS)])).problems
    assert problem.endswith(f"Did you mean {meant}?")


def test_all_unknown_flags_are_reported():
    parsed = parse(["--foo", "1", "--lr", "2", "--bar"], flag_table())
    assert len(parsed.problems) == 2
    assert parsed.values == {"lr": "2"}


def test_a_stray_value_is_reported():
    parsed = parse(["oops", "--lr", "2", "3", "--colocate", "4"], flag_table())
    assert [problem.split()[0] for problem in parsed.problems] == ["'oops'", "'3'", "'4'"]
    assert parsed.values == {"lr": "2", "colocate": True}


def test_a_flag_without_its_value_is_reported():
    parsed = parse(["--lr", "--colocate", "--seed", "3", "--profile-target"], flag_table())
    assert parsed.problems == [
        "--lr needs a value: expected a number",
        "--profile-target needs a value: expected one of train_overall, train_actor, train_log_probs",
    ]
    assert parsed.values == {"colocate": True, "seed": "3"}


def test_a_switch_takes_no_value():
    parsed = parse(["--colocate=true", "--lr", "1"], flag_table())
    assert parsed.problems == ["--colocate=true: --colocate takes no value; --no-colocate switches it off"]
    assert parsed.values == {"lr": "1"}


def test_a_value_may_start_with_a_dash():
    assert parse(["--entropy-coef", "-1e-3"], flag_table()).values == {"entropy_coef": "-1e-3"}
    assert parse(["--wandb-group", "-x"], flag_table()).values == {"wandb_group": "-x"}
    assert parse(["--wandb-group=--x=y"], flag_table()).values == {"wandb_group": "--x=y"}


def test_a_flag_of_an_absent_package_names_the_package():
    core = build_table([("miles-core", GROUPS)])
    for spelling, package in (
        ("--rollout-temperature", "miles-rollout"),
        ("--attn-implementation", "miles-fsdp"),
        ("--use-miles-router", "miles-router"),
        ("--mtp-num-layers", "miles-megatron"),
    ):
        (problem,) = parse([spelling, "1"], core).problems
        assert f"pip install {package}" in problem


@pytest.mark.parametrize(
    ("flags", "value"),
    [
        (["--engine-chunk", "5"], 5),
        (["--engine-chunk=5"], 5),
        (["--engine-chunk", "0.5"], 0.5),
        (["--engine-chunk", "-1"], -1),
        (["--engine-chunk", "fa3"], "fa3"),
        (["--engine-chunk", '{"a": 1}'], '{"a": 1}'),
        (["--engine-chunk"], True),
        (["--engine-chunk", "false"], False),
        (["--engine-chunk", "1", "2"], [1, 2]),
    ],
)
def test_undeclared_flags_with_a_prefix_are_captured(table, flags, value):
    parsed = parse([*flags, "--engine-port", "80"], table)
    assert parsed.captured == {"engine_options": {"chunk": value}}
    assert parsed.values == {"engine_port": "80"}
    assert not parsed.problems


def test_captured_names_have_underscores(table):
    assert parse(["--engine-max-total-tokens", "9"], table).captured["engine_options"] == {"max_total_tokens": 9}
