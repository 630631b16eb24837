"""RMSNorm as one node of the graph, with a backward pass by hand, for CPUs.

Written out operation by operation, a norm costs a small model more than its matrix products: every step of its backward
pass reads and writes a whole tensor of activations, and keeps one.  Here what is kept is the input and one number per
row.
"""

from __future__ import annotations

import copy
import inspect
from types import MethodType
from typing import Any

import torch
from torch import nn

# What rounding may change: both sides compute in fp32.
_TOLERANCE = 1e-5
_PROBE_ROWS = 3


class RmsNorm(torch.autograd.Function):  # type: ignore[misc]
    """``weight * x / rms(x)`` over the last dimension; x [..., D], weight [D]."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
        scale = rms_scale(x, eps)
        ctx.save_for_backward(x, weight_D, scale)
        return (x * scale).mul_(weight_D)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        x, weight_D, scale = ctx.saved_tensors
        return *rms_gradients(grad, x * scale, weight_D, scale), None


def rms_scale(x: torch.Tensor, eps: float) -> torch.Tensor:
    """[..., 1] by which a norm multiplies x [..., D]."""
    return torch.linalg.vecdot(x, x).div_(x.shape[-1]).add_(eps).rsqrt_().unsqueeze(-1)


def rms_gradients(
    grad: torch.Tensor, normed: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of a norm's input and of its weight, from that of its output and from the input times ``scale``."""
    grad_weight = (grad * normed).sum(tuple(range(grad.ndim - weight.ndim)))
    grad_x = grad * weight
    along = torch.linalg.vecdot(grad_x, normed).div_(-weight.shape[-1]).unsqueeze(-1)
    return grad_x.addcmul_(normed, along).mul_(scale), grad_weight


def fuse_norms(model: nn.Module) -> int:
    """Let the model's RMSNorms compute in one step, and say how many there are.

    A norm is one that computes the same, whatever its class; others stay as they are, and so does every call that is
    not in fp32 on a CPU.
    """
    norms = [module for module in model.modules() if _is_rms_norm(module)]
    for norm in norms:
        norm.forward = MethodType(_forward_of(norm), norm)
    return len(norms)


def _forward_of(norm: nn.Module) -> Any:
    """The new forward, which leaves to the old one what it does not compute."""
    written_out = norm.forward

    def forward(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        if x.dtype != torch.float32 or self.weight.dtype != torch.float32 or x.device.type != "cpu":
            return written_out(x)
        normed: torch.Tensor = RmsNorm.apply(x, self.weight, self.variance_epsilon)
        return normed

    return forward


@torch.no_grad()  # type: ignore[untyped-decorator]
def _is_rms_norm(module: nn.Module) -> bool:
    weight, eps = getattr(module, "weight", None), getattr(module, "variance_epsilon", None)
    if "RMSNorm" not in type(module).__name__ or not isinstance(weight, torch.Tensor) or not isinstance(eps, float):
        return False
    if weight.ndim != 1 or len(list(module.parameters())) != 1:
        return False
    if len(inspect.signature(module.forward).parameters) != 1:
        return False  # gated norms take a gate too
    probe = copy.deepcopy(module).to_empty(device="cpu").float()
    probe.weight.copy_(torch.linspace(0.5, 2.0, len(weight)))
    x = torch.linspace(-1.0, 2.0, _PROBE_ROWS * len(weight)).view(_PROBE_ROWS, -1)
    computed: torch.Tensor = RmsNorm.apply(x, probe.weight, eps)
    return bool(torch.allclose(probe(x), computed, rtol=_TOLERANCE, atol=_TOLERANCE))
