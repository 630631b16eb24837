"""Command lines in, problems out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from miles.core.config import Config

Problems = Callable[..., list[str]]


@pytest.fixture
def problems() -> Problems:
    """Problems of a command line that mention ``about``; the batch is given unless the line gives it."""

    def find(*flags: str, about: str) -> list[str]:
        batch = () if "--rollout-batch-size" in flags else ("--rollout-batch-size", "8")
        _, found = Config.examine([*batch, *flags])
        return [problem for problem in found if about in problem]

    return find


@pytest.fixture
def resolve() -> Callable[..., Config]:
    """The configuration of a command line, unchecked."""

    def make(*flags: str) -> Config:
        batch = () if "--rollout-batch-size" in flags else ("--rollout-batch-size", "8")
        return Config.from_flags([*batch, *flags], check=False)

    return make


@pytest.fixture
def hf_checkpoint(tmp_path: Path) -> str:
    """A directory that looks like a checkpoint."""
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "config.json").write_text("{}")
    return str(directory)
