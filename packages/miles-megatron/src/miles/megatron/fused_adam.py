"""AdamW with the interface of Apex's FusedAdam, for machines that have neither Apex nor Transformer Engine."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn


class FusedAdam(torch.optim.Optimizer):  # type: ignore[misc]
    """Adam whose step count lives in its parameter groups.

    ``adam_w_mode`` decouples weight decay (arXiv:1711.05101).  Moments are in fp32 whatever the parameters are.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        adam_w_mode: bool = True,
        weight_decay: float = 0.0,
        **kwargs: Any,
    ) -> None:
        defaults = {
            "lr": lr,
            "bias_correction": bias_correction,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
        }
        super().__init__(params, defaults)
        self.adam_w_mode = adam_w_mode

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def step(self, closure: Callable[[], float] | None = None) -> None:
        for group in self.param_groups:
            group["step"] = int(group.get("step", 0)) + 1
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

    def _update(self, parameter: torch.Tensor, group: dict[str, Any]) -> None:
        step, (beta1, beta2), decay = group["step"], group["betas"], group["weight_decay"]
        grad = parameter.grad.float()
        state = self.state[parameter]
        if not state:
            state["exp_avg"] = torch.zeros_like(grad)
            state["exp_avg_sq"] = torch.zeros_like(grad)
        if self.adam_w_mode:
            parameter.mul_(1.0 - group["lr"] * decay)
        elif decay:
            grad = grad + decay * parameter
        mean, square = state["exp_avg"], state["exp_avg_sq"]
        mean.lerp_(grad, 1.0 - beta1)
        square.mul_(beta2).addcmul_(grad, grad, value=1.0 - beta2)
        correction1, correction2 = 1.0, 1.0
        if group["bias_correction"]:
            correction1, correction2 = 1.0 - beta1**step, 1.0 - beta2**step
        denominator = (square / correction2).sqrt_().add_(group["eps"])
        parameter.addcdiv_(mean, denominator, value=-group["lr"] / correction1)
