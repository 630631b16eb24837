"""Megatron-Core on a machine without CUDA: its calls of ``torch.cuda`` answered by the CPU, its groups by gloo.

Megatron-Core names CUDA in many places (``device="cuda"``, ``torch.cuda.current_device()``, streams, generators, type
strings).  ``install`` gives these a meaning on the CPU.  It changes torch for the whole process, and only where there
is no CUDA device; with one, nothing here runs.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import multiprocessing
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch

_CPU = torch.device("cpu")
_FACTORIES = (
    "arange",
    "empty",
    "empty_like",
    "eye",
    "full",
    "full_like",
    "linspace",
    "ones",
    "ones_like",
    "rand",
    "randint",
    "randn",
    "tensor",
    "zeros",
    "zeros_like",
)
_installed = False


def install() -> None:
    """Make Megatron-Core importable and usable here.  Call before anything of it is imported; safe to repeat.

    Does nothing where there is a CUDA device.
    """
    global _installed
    if _installed or torch.cuda.is_available():
        return
    _installed = True
    _replace_cuda_module()
    _replace_device_arguments()
    _replace_type_names()
    with _plain_import():
        _adapt_megatron()


class _Event:
    """A point on a stream.  The CPU computes at once, so every point has passed."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def record(self, *args: Any) -> None: ...

    def wait(self, *args: Any) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: _Event) -> float:
        return 0.0


class _Stream(_Event):
    """The one order in which a CPU computes."""

    def wait_stream(self, *args: Any) -> None: ...

    def wait_event(self, *args: Any) -> None: ...

    def record_event(self, *args: Any) -> _Event:
        return _Event()


def _answer(value: Any = None) -> Callable[..., Any]:
    """A function that answers every call with ``value``.  One per name: torch's compiler keeps a table of them."""
    return lambda *args, **kwargs: value


def _replace_cuda_module() -> None:
    """``torch.cuda``: the device is the CPU, streams do nothing, the generator is the CPU's."""
    cuda, stream = torch.cuda, _Stream()
    cuda.current_device = _answer(_CPU)
    cuda.device_count = _answer(1)  # ranks are counted modulo devices
    for name in ("set_device", "synchronize", "empty_cache"):
        setattr(cuda, name, _answer())
    for name in ("current_stream", "default_stream"):
        setattr(cuda, name, _answer(stream))
    cuda.stream = _answer(contextlib.nullcontext())
    cuda.Stream, cuda.Event = _Stream, _Event
    for name in ("range_push", "range_pop"):
        setattr(cuda.nvtx, name, _answer())
    cuda.get_rng_state = cuda.random.get_rng_state = lambda device=None: torch.get_rng_state()
    cuda.set_rng_state = lambda state, device=None: torch.set_rng_state(state)
    cuda.manual_seed = lambda seed: torch.random.default_generator.manual_seed(seed)


def _on_cpu(device: Any) -> Any:
    """CUDA devices, by whatever name, become the CPU; others stay."""
    if isinstance(device, int) or str(device).startswith("cuda"):
        return _CPU
    return device


def _replace_device_arguments() -> None:
    # ``with torch.device(...)`` collects the factories at its first use and must find the original ones.
    importlib.import_module("torch.utils._device")._device_constructors()
    for name in _FACTORIES:
        setattr(torch, name, _factory_on_cpu(getattr(torch, name)))
    torch.Tensor.cuda = lambda self, *args, **kwargs: self
    torch.nn.Module.cuda = lambda self, *args, **kwargs: self
    torch.Tensor.to = _moved_to_cpu(torch.Tensor.to)


def _factory_on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(factory)
    def made(*args: Any, **kwargs: Any) -> torch.Tensor:
        if kwargs.get("device") is not None:
            kwargs["device"] = _on_cpu(kwargs["device"])
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return made


def _moved_to_cpu(to: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(to)
    def moved(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        args = tuple(_on_cpu(arg) if isinstance(arg, str | torch.device) else arg for arg in args)
        if kwargs.get("device") is not None:
            kwargs["device"] = _on_cpu(kwargs["device"])
        return to(self, *args, **kwargs)

    return moved


def _replace_type_names() -> None:
    """Optimizers of Megatron-Core sort parameters by type strings and know CUDA's alone."""
    type_of = torch.Tensor.type

    def cuda_type(self: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        if dtype is None:
            return type_of(self).replace("torch.", "torch.cuda.", 1)
        return type_of(self, dtype, *args, **kwargs)

    torch.Tensor.type = cuda_type


@contextlib.contextmanager
def _plain_import() -> Iterator[None]:
    """Import without compiling the fused functions (that needs a C++ compiler and seconds) and without its warnings."""
    compile_function = torch.compile
    torch.compile = lambda function=None, *args, **kwargs: function or (lambda wrapped: wrapped)
    with warnings.catch_warnings(record=True):  # its import sets filters of its own
        importlib.import_module("megatron.core.models.gpt.gpt_layer_specs")
        yield
    torch.compile = compile_function


def _adapt_megatron() -> None:
    _adapt_layers()
    _adapt_random()
    _adapt_collectives()
    _adapt_mixture_of_experts()
    _adapt_optimizer()
    _adapt_checkpoints()


def _replace(module: str, **names: Any) -> None:
    """Give ``names`` in ``megatron.core.<module>`` other values."""
    for name, value in names.items():
        setattr(importlib.import_module(f"megatron.core.{module}"), name, value)


def _adapt_layers() -> None:
    """Layers advise on a setting of CUDA."""
    layers = importlib.import_module("megatron.core.tensor_parallel.layers")
    layers.linear_with_grad_accumulation_and_async_allreduce.warned = True


def _adapt_random() -> None:
    """The tracked generator is the CPU's; recomputation asks for FP8 state, which nothing here has."""
    name = "tensor_parallel.random"
    _replace(
        name,
        _get_cuda_rng_state=lambda *args, **kwargs: torch.get_rng_state(),
        _set_cuda_rng_state=lambda state, *args, **kwargs: torch.set_rng_state(state),
    )
    if not hasattr(importlib.import_module(f"megatron.core.{name}"), "FP8GlobalStateManager"):
        nothing = _answer(contextlib.nullcontext())
        _replace(name, FP8GlobalStateManager=_NoFp8, activation_recompute_forward=nothing, fp8_autocast=nothing)
    quiet = logging.getLogger(f"megatron.core.{name}")
    quiet.addFilter(lambda record: "CPU RNG state changed" not in record.getMessage())


class _NoFp8:
    """Stands for Transformer Engine's FP8 state."""

    @staticmethod
    def is_fp8_enabled() -> bool:
        return False

    @staticmethod
    def get_fp8_recipe() -> None:
        return None


def _adapt_collectives() -> None:
    """gloo gathers and scatters parts of one size only; those of experts differ."""
    mappings = importlib.import_module("megatron.core.tensor_parallel.mappings")
    gather, scatter = mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim

    def gather_any(x: torch.Tensor, group: Any, sizes: Any = None, use_global_buffer: bool = False) -> Any:
        if sizes is None:
            return gather(x, group, None, use_global_buffer)
        padded = x.new_zeros((max(sizes), *x.shape[1:]))
        padded[: len(x)] = x
        parts = [torch.empty_like(padded) for _ in sizes]
        torch.distributed.all_gather(parts, padded, group=group)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    def scatter_any(x: torch.Tensor, group: Any, sizes: Any = None, use_global_buffer: bool = False) -> Any:
        if sizes is None:
            return scatter(x, group, None, use_global_buffer)
        total = x.clone()
        torch.distributed.all_reduce(total, group=group)
        return total.split([int(size) for size in sizes])[group.rank()].contiguous()

    _replace(
        "tensor_parallel.mappings",
        _gather_along_first_dim=gather_any,
        _reduce_scatter_along_first_dim=scatter_any,
    )


def _adapt_mixture_of_experts() -> None:
    moe_utils = "transformer.moe.moe_utils"
    if not hasattr(importlib.import_module(f"megatron.core.{moe_utils}"), "te_general_gemm"):
        _replace(moe_utils, te_general_gemm=None)  # bound only with Transformer Engine, read without it
    _replace("transformer.moe.token_dispatcher", maybe_move_tensor_to_cpu=_split_sizes)


def _split_sizes(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """Sizes of an all-to-all as numbers; Megatron-Core converts them only when they come from CUDA."""
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


def _adapt_optimizer() -> None:
    """Checkpoints of the distributed optimizer work only with an Adam whose groups count steps, as Apex's do."""
    from miles.megatron.fused_adam import FusedAdam

    _replace("optimizer", Adam=FusedAdam, USING_PYTORCH_OPTIMIZER=False)
    _replace("optimizer.distrib_optimizer", Adam=FusedAdam, HAVE_APEX_OR_TE=True, USING_APEX_OPTIMIZER=True)


def _adapt_checkpoints() -> None:
    """Writers are forked: a spawned process would import everything again, without this adaptation."""
    for name in ("filesystem_async", "async_utils"):
        _replace(f"dist_checkpointing.strategies.{name}", mp=_Forking("mp"))


class _Forking(types.ModuleType):
    """``torch.multiprocessing`` that only forks."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.multiprocessing, name)

    def get_context(self, method: str | None = None) -> Any:
        return multiprocessing.get_context("fork")
