"""Models and layers of the user's own: ``--custom-model-provider-path`` and ``--spec``."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from megatron.core.models.gpt import GPTModel
from miles.core.errors import TrainingError
from miles.core.flags.training import Training
from miles.core.registry import load_object
from miles.megatron.flags import Megatron
from miles.megatron.language_model import LanguageModel

if TYPE_CHECKING:
    from miles.core.config import Config

Build = Callable[[bool, bool, int | None], nn.Module]
"""Builds a chunk from whether it is the first one, whether the last, and its number on this stage."""
_own_model: ContextVar[Build] = ContextVar("own_model")


def default_model(pre_process: bool, post_process: bool, vp_stage: int | None = None) -> nn.Module:
    """The chunk as it would be without a provider.  For providers, which may change it."""
    return _own_model.get()(pre_process, post_process, vp_stage)


@dataclass(frozen=True, slots=True)
class Provider:
    """The user's function that builds a chunk of the model."""

    path: str
    function: Callable[..., Any]

    @classmethod
    def of(cls, config: Config) -> Provider | None:
        path = config[Training].custom_model_provider_path
        return None if path is None else cls(path, load_object(path))

    def model(self, pre_process: bool, post_process: bool, vp_stage: int | None, own_model: Build) -> LanguageModel:
        """What the function builds, as the trainer runs it."""
        takes_stage = "vp_stage" in inspect.signature(self.function).parameters
        stage = {"vp_stage": vp_stage} if takes_stage else {}
        with _set(own_model):
            model = self.function(pre_process, post_process, **stage)
        if not isinstance(model, GPTModel):
            raise TrainingError(
                f"--custom-model-provider-path {self.path} returned {type(model).__name__}; expected a GPTModel of "
                "megatron.core.models.gpt"
            )
        if not isinstance(model, LanguageModel):
            kind = type(model)
            model.__class__ = type(kind.__name__, (LanguageModel, kind), {})
        chunk: LanguageModel = model
        return chunk


@contextmanager
def _set(own_model: Build) -> Iterator[None]:
    token = _own_model.set(own_model)
    try:
        yield
    finally:
        _own_model.reset(token)


def layer_spec(config: Config) -> Callable[[Any, int | None], Any] | None:
    """``--spec``: the layers of a stage from Megatron-Core's configuration and the number of the chunk."""
    spec: Sequence[str] | None = config[Megatron].spec
    if spec is None:
        return None
    found = load_object(".".join(spec))
    if not callable(found):
        return lambda transformer, part: found
    return lambda transformer, part: found(config, transformer, part)
