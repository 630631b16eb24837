"""What SGLang imports and a CPU has not."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any, NoReturn

import torch


def install() -> None:
    """Put the stand-ins in place.  To be called before anything of SGLang or torchvision is imported."""
    # PyPI's torchvision is built for CUDA's torch; registering its operators with a CPU's fails.
    sys.modules.setdefault("torchvision._meta_registrations", ModuleType("torchvision._meta_registrations"))
    if find_spec("sgl_kernel") is None:
        sys.modules["sgl_kernel"] = _Kernels()
    torch.Tensor.cuda = lambda tensor, *_args, **_named: tensor  # the comparison of weights would move them


def install_unpinned_memory() -> None:
    """Let what asks for memory that is pinned for a device have ordinary memory."""
    torch.tensor, torch.zeros = _unpinned(torch.tensor), _unpinned(torch.zeros)
    torch.Tensor.pin_memory = lambda tensor, *_args, **_named: tensor


def _unpinned(make: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(make)
    def without_pinning(*args: Any, pin_memory: bool = False, **named: Any) -> Any:
        return make(*args, **named)

    return without_pinning


class _Kernels(ModuleType):
    """``sgl_kernel`` whose functions can be imported but not called."""

    def __init__(self) -> None:
        super().__init__("sgl_kernel", "Stands in for kernels of an accelerator.")
        self.__path__: list[str] = []
        self.__version__ = "99.0.0"
        self.__spec__ = ModuleSpec("sgl_kernel", None, is_package=True)

    def __getattr__(self, name: str) -> Callable[..., NoReturn]:
        if name.startswith("__"):
            raise AttributeError(name)

        def missing(*_args: Any, **_named: Any) -> NoReturn:
            raise RuntimeError(f"sgl_kernel.{name} needs an accelerator, and this server runs on a CPU")

        missing.__name__ = name
        return missing
