"""Loss scaling: gradients in fp16 are kept out of its underflow by a factor that adapts."""

from __future__ import annotations

import torch

_FIRST_SCALE = 2.0**16
_LARGEST_SCALE = 2.0**24
_STEPS_TO_GROW = 1000


class LossScaler:
    """The factor of the loss: halved where a gradient overflows, doubled after a thousand steps without.

    ``state`` holds scale and steps since the last change, as tensors of a checkpoint.
    """

    def __init__(self) -> None:
        self.state = {"scale": torch.tensor(_FIRST_SCALE), "good_steps": torch.tensor(0)}

    @property
    def scale(self) -> float:
        return float(self.state["scale"])

    def overflowed(self) -> None:
        """A step was not taken."""
        self._set(max(1.0, self.scale / 2), 0)

    def stepped(self) -> None:
        """A step was taken."""
        good = int(self.state["good_steps"]) + 1
        if good < _STEPS_TO_GROW:
            self._set(self.scale, good)
        else:
            self._set(min(_LARGEST_SCALE, self.scale * 2), 0)

    def _set(self, scale: float, good_steps: int) -> None:
        self.state["scale"].fill_(scale)
        self.state["good_steps"].fill_(good_steps)
