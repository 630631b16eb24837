"""``docs/reference/hooks.md`` is what ``miles config --hooks`` writes."""

from __future__ import annotations

from pathlib import Path

from miles.core.config.discover import build_table, flag_table
from miles.core.config.hooks_page import markdown

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "hooks.md"


def test_the_page_is_current():
    own = [group for group in flag_table().groups if group.__module__.startswith("miles.")]
    assert PAGE.read_text(encoding="utf-8") == markdown(build_table([("miles", tuple(own))])), (
        "run: MILES_DISABLE_PLUGINS=1 miles config --hooks docs/reference/hooks.md"
    )
