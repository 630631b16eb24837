"""The 254 flags that launch scripts rely on: spelling, default and type, as in the table ``data/flags.json``."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from miles.core.config.discover import flag_table
from miles.core.config.flag import REQUIRED, FlagSpec

TABLE = json.loads((Path(__file__).parent / "data" / "flags.json").read_text())
ROWS = {row["flag"]: row for row in TABLE}

# Defaults that the table states in words, and what stands for them here.
IN_WORDS = {
    "--lr-decay-style": None,
    "--rollout-function-path": "miles.rollout.sglang_rollout.generate_rollout",
    "--critic-load": None,
    "--miles-router-middleware-paths": [],
    "--profile-target": ["train_overall"],
    "--multimodal-keys": None,
}
# Columns that the table calls text and that hold JSON, and closed sets that plugins extend.
AS_JSON = {"--multimodal-keys", "--apply-chat-template-kwargs"}
BY_PLUGIN = {"--train-backend", "--rm-type"}
# The table says text; only these texts are accepted.
CLOSED_SETS = {"--lr-decay-style", "--lr-wsd-decay-style"}


def spec_of(flag: str) -> FlagSpec:
    return flag_table().by_spelling[flag]


def test_the_table_is_whole():
    assert len(TABLE) == len(ROWS) == 254


@pytest.mark.parametrize("flag", ROWS)
def test_every_flag_exists(flag):
    assert flag in flag_table().by_spelling


@pytest.mark.parametrize("flag", [flag for flag in ROWS if flag in flag_table().by_spelling])
def test_default_is_the_documented_one(flag):
    spec, documented = spec_of(flag), ROWS[flag]["default"].strip('"')
    if flag in IN_WORDS:
        assert spec.default == IN_WORDS[flag]
    elif documented == "Required":
        assert spec.default is REQUIRED
    elif documented == "None":
        assert spec.default is None
    elif spec.is_switch:
        switched_on = spec.default is not spec.flag.negates
        assert spec.default in (True, False)
        assert str(bool(switched_on and not spec.flag.negates)) == documented
    else:
        assert spec.parse(documented) == spec.default


@pytest.mark.parametrize("flag", [flag for flag in ROWS if flag in flag_table().by_spelling])
def test_type_or_choices_are_the_documented_ones(flag):
    spec, documented = spec_of(flag), ROWS[flag]["type"]
    if flag in BY_PLUGIN:
        assert spec.flag.plugin is not None
    elif "bool" in documented:
        assert spec.is_switch
    elif documented.startswith("`"):
        choices = [choice for choice in re.findall(r"`([^`]+)`", documented) if choice != "None"]
        assert list(spec.choices) == choices
        assert spec.optional or "`None`" not in documented
    elif "JSON" in documented or flag in AS_JSON:
        assert spec.type_name == "JSON"
    else:
        kind = documented.removeprefix("Type: ")
        assert spec.type_name == kind
        assert not spec.choices or flag in CLOSED_SETS
