"""Makes this folder's models importable and makes each one once."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

from engine_models import load, save_model

from miles.rollout.engines.embedded.model import Model


@pytest.fixture(scope="session")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Directory of one of MODELS."""
    made: dict[str, Path] = {}

    def path(name: str) -> Path:
        if name not in made:
            made[name] = save_model(name, tmp_path_factory.mktemp(name))
        return made[name]

    return path


@pytest.fixture(scope="session")
def model(model_path: Callable[[str], Path]) -> Callable[[str], Model]:
    """One of MODELS as the engine serves it; not to be changed."""
    made: dict[str, Model] = {}

    def get(name: str) -> Model:
        if name not in made:
            made[name] = load(model_path(name))
        return made[name]

    return get


@pytest.fixture(autouse=True)
def _one_thread():
    """Restore the number of threads that a test has changed."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
