"""``docs/reference/cli.md`` is what ``miles config --reference`` writes."""

from __future__ import annotations

from pathlib import Path

from miles.core.config.discover import build_table, flag_table
from miles.core.config.reference import markdown

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "cli.md"


def test_the_page_is_current(monkeypatch):
    table = flag_table()
    own = [group for group in table.groups if group.__module__.startswith("miles.")]
    current = markdown(build_table([("miles", tuple(own))]))
    assert PAGE.read_text(encoding="utf-8") == current, (
        "run: MILES_DISABLE_PLUGINS=1 miles config --reference docs/reference/cli.md"
    )
