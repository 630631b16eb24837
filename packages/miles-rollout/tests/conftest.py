"""Makes this folder's fakes importable, and shares what is slow to make."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from rollout_fakes import save_tokenizer

from miles.rollout.text import ChatTokenizer, load_tokenizer


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A directory with a tokenizer."""
    return str(save_tokenizer(tmp_path_factory.mktemp("checkpoint")))


@pytest.fixture(scope="session")
def tokenizer(checkpoint: str) -> ChatTokenizer:
    return load_tokenizer(checkpoint)
