from __future__ import annotations

from miles.core.cli import main
from miles.core.config.discover import flag_table
from miles.core.config.hooks_page import markdown, signatures
from miles.core.protocols.rollout import DataSource
from miles.core.types import hooks
from miles.core.types.hook_table import HOOKS


def test_signatures_are_written_as_in_the_code() -> None:
    assert list(signatures(hooks.DynamicFilter)) == ["(args: Any, samples: Group) -> DynamicFilterOutput | bool"]
    assert [text.partition("(")[0] for text in signatures(DataSource)] == [
        "get_samples",
        "add_samples",
        "save",
        "load",
    ]


def test_every_flag_for_a_function_of_the_users_has_a_hook() -> None:
    own = {name: spec for name, spec in flag_table().flags.items() if spec.group.__module__.startswith("miles.")}
    paths = {name for name, spec in own.items() if spec.flag.path}
    assert paths - set(HOOKS) == set()


def test_every_hook_says_what_it_is_for() -> None:
    page = markdown(flag_table())
    for field, forms in HOOKS.items():
        assert all(form.__doc__ for form in forms), field
        if field in flag_table().flags:
            assert f"## `{flag_table().flags[field].spelling}`" in page


def test_the_command_writes_the_page(capsys) -> None:
    assert main(["config", "--hooks"]) == 0
    assert capsys.readouterr().out.startswith("# Functions of your own")
