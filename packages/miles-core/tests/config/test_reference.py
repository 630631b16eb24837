import json
import re
from typing import Annotated

from miles.core.config.discover import build_table, flag_table
from miles.core.config.group import Flag, Group
from miles.core.config.help import all_flags, explain
from miles.core.config.reference import json_schema, markdown


def test_every_flag_has_a_row():
    page = markdown(flag_table())
    for spelling, spec in flag_table().by_spelling.items():
        assert (f"| `{spelling}` |" in page) is (spec.group.read_from is None)


def test_flags_of_an_installed_library_are_not_on_a_page_that_every_version_shares():
    class Read(Group):
        title = "Read From A Library"
        read_from = "some-library"

        its_flag: int | None = None

    page = markdown(build_table([("miles", (Read,))]))
    assert "--its-flag" not in page
    assert "the installed some-library declares" in page


def test_every_row_has_four_cells():
    for line in markdown(flag_table()).splitlines():
        if line.startswith("| `"):
            assert len(re.split(r"(?<!\\)\|", line)) == 6, line


def test_the_schema_describes_what_a_file_may_hold():
    schema = json_schema(flag_table())
    json.dumps(schema)
    assert schema["properties"]["lr"]["type"] == "number"
    assert schema["properties"]["loss-type"]["enum"] == ["policy_loss", "sft_loss", "custom_loss"]
    assert schema["properties"]["disable-grpo-std-normalization"]["default"] is False
    assert "config" not in schema["properties"]


def test_the_schema_leaves_out_what_is_refused():
    class Planned(Group):
        title = "Planned"

        half_done: Annotated[int | None, Flag(unsupported="the other half is missing")] = None
        """A number."""

    assert json_schema(build_table([("acme", (Planned,))]))["properties"] == {}


def test_help_lists_every_flag():
    text = all_flags(flag_table())
    for spelling in flag_table().by_spelling:
        assert f"  {spelling}" in text


def test_an_explanation_tells_owner_and_default():
    text = explain(flag_table().flags["eps_clip_high"])
    assert "miles-core" in text
    assert "value of --eps-clip" in text
