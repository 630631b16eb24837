"""The plugin's own flags.  Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from pydantic import NonNegativeInt

from miles.core.config.group import Group

if TYPE_CHECKING:
    from miles.core.config import Config


class Fake(Group):
    title = "Fake Plugin"

    fake_target_length: NonNegativeInt = 16
    """Characters of a response that gets the full reward of ``--rm-type fake_length``."""


GROUPS: tuple[type[Group], ...] = (Fake,)


def check_target_length(config: Config) -> Iterator[str]:
    """A target nobody can miss teaches nothing."""
    if config.rm_type == "fake_length" and config[Fake].fake_target_length == 0:
        yield "--fake-target-length 0: every response would be too long. Expected at least 1"


CHECKS: tuple[Callable[[Config], Iterator[str]], ...] = (check_target_length,)
