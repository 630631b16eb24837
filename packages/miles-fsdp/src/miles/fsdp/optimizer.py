"""Optimizers, and their state under stable names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import nn

from miles.core.flags.optimizer import Optimizer

# Tensors of state per parameter, as torch's optimizers lay them out; ``step`` is a scalar.
_STATE_NAMES: Mapping[str, tuple[str, ...]] = {"adam": ("step", "exp_avg", "exp_avg_sq"), "sgd": ()}


def build_optimizer(flags: Optimizer, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW, or SGD without momentum.  Weight decay spares vectors (norm scales, biases).

    The learning rate is set before each step.
    """
    parameters = list(parameters)
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": flags.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if flags.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=0.0)
    return torch.optim.AdamW(groups, lr=0.0, betas=(flags.adam_beta1, flags.adam_beta2), eps=flags.adam_eps, fused=True)


def optimizer_state(
    flags: Optimizer, optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]
) -> dict[str, torch.Tensor]:
    """The optimizer's own tensors as ``parameter.state``, created where no step has been taken yet.

    Loading into these tensors in place restores the optimizer.
    """
    tensors = {}
    for parameter_name, parameter in parameters.items():
        state = optimizer.state[parameter]
        for name in _STATE_NAMES[flags.optimizer]:
            if name not in state:
                state[name] = _zero_state(name, parameter)
            tensors[f"{parameter_name}.{name}"] = state[name]
    return tensors


def _zero_state(name: str, parameter: nn.Parameter) -> torch.Tensor:
    if name == "step":
        return torch.zeros((), dtype=torch.float32, device=parameter.device)
    return torch.zeros_like(parameter, memory_format=torch.preserve_format, requires_grad=False)
