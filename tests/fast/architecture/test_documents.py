"""What documents refer to exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from miles.core.config.discover import flag_table
from miles.core.contract import check_filter, check_reward, example_sample
from miles.core.registry import load_object
from miles.router.settings import Settings

ROOT = Path(__file__).parents[3]
LINK = re.compile(r"\]\(([^)#\s]+)")
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]*[a-z0-9](?![\w-])")
OTHERS = {"--eps-clip-hihg", "--depth", "--strict", "--enable-memory-saver"}
"""A misspelling that is shown on purpose; flags of git, mypy and SGLang."""


@pytest.fixture(scope="module")
def documents():
    places = ["*.md", "docs/*.md", "packages/*/*.md", "tools/**/*.md", "tests/utils/*/*.md"]
    return {path: path.read_text(encoding="utf-8") for place in places for path in ROOT.glob(place)}


def test_every_relative_link_leads_somewhere(documents):
    broken = [
        f"{path}: {target}"
        for path, text in documents.items()
        for target in LINK.findall(text)
        if not target.startswith(("http://", "https://")) and not (path.parent / target).exists()
    ]
    assert not broken


def test_every_flag_exists(documents):
    table = flag_table()
    sources = [path for place in ("packages/*/src/**/*.py", "tools/**/*.py") for path in ROOT.glob(place)]
    known = OTHERS.union(*(FLAG.findall(path.read_text(encoding="utf-8")) for path in sources))
    known |= {f"--{name.replace('_', '-')}" for name in Settings.model_fields}
    unknown = [
        f"{path}: {flag}"
        for path, text in documents.items()
        for flag in FLAG.findall(text)
        if flag not in known and table.find(_affirmed(flag)) is None and table.collector(flag) is None
    ]
    assert not unknown


def _affirmed(flag: str) -> str:
    """``--no-NAME`` takes ``--NAME`` back."""
    return flag.replace("--no-", "--", 1)


def test_the_functions_that_are_shown_work(tmp_path, monkeypatch):
    page = (ROOT / "docs/extending.md").read_text(encoding="utf-8")
    name, code = re.search(r"```python\n# (\w+)\.py\n(.*?)```", page, re.DOTALL).groups()
    (tmp_path / f"{name}.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    reward, keep = load_object(f"{name}.reward"), load_object(f"{name}.keep")
    assert check_reward(reward) == check_filter(keep) == []
    assert reward(None, example_sample(response="It is\n42.", label="42")) == 1.0
    assert reward(None, example_sample(response="", label="42")) == 0.0
