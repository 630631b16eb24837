"""Matrix products with weights, which are laid out for the processor where that pays.

oneDNN keeps a copy of a large weight in blocks that it reads in the order of computing: a fifth less time for many
rows, two fifths for few.  Both ways give a row the same bits whatever the number of rows, when that is a multiple of
four; which way a weight goes depends on its size alone.

M = rows, N = outputs, K = inputs.
"""

from __future__ import annotations

import torch

from miles.rollout.engines.embedded.adapters import LowRank
from miles.rollout.engines.embedded.elementwise import silu_

_WORTH_LAYING_OUT = 1 << 16
"""Elements of a weight from which on a call of oneDNN costs less than it saves."""


def can_lay_out(dtype: torch.dtype) -> bool:
    """Whether this build of torch has oneDNN for linear layers, and oneDNN this processor's instructions for them."""
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return False
    return dtype != torch.bfloat16 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


class Projection:
    """``x @ weight.T + bias``.

    ``weight`` [N, K] and ``bias`` [N] stay where they are and may be changed in place; ``lay_out`` takes the change in.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        self.weight, self.bias = weight, bias
        self._blocks: torch.Tensor | None = None
        self._adapter: LowRank | None = None

    def attach(self, adapter: LowRank | None) -> None:
        """Add what ``adapter`` makes of the rows to every product."""
        self._adapter = adapter

    def lay_out(self) -> None:
        """Copy a large weight into oneDNN's layout."""
        if self.weight.numel() >= _WORTH_LAYING_OUT and can_lay_out(self.weight.dtype):
            self._blocks = torch.ops.mkldnn._reorder_linear_weight(self.weight)

    def forget_layout(self) -> int:
        """Free the copy; the bytes that it took."""
        freed = 0 if self._blocks is None else int(self.weight.nbytes)
        self._blocks = None
        return freed

    def __call__(self, rows: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """The product [M, N] for ``rows`` [M, K]; in ``out``, or in new memory."""
        return self._apply(rows, out, "none")

    def silu(self, rows: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """``silu`` of the product; in ``out``, or in new memory."""
        if self._blocks is not None and self._adapter is None:
            return self._apply(rows, out, "swish")
        return silu_(self._apply(rows, out, "none"))

    def add_to(self, stream: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """``stream`` [M, N] plus the product; in ``stream``, or in new memory."""
        if self._blocks is not None:
            stream = torch.ops.mkldnn._linear_pointwise.binary(rows, stream, self._blocks, self.bias, "add")
        else:
            stream.addmm_(rows, self.weight.t())
            if self.bias is not None:
                stream.add_(self.bias)
        return self._adapted(stream, rows)

    def _apply(self, rows: torch.Tensor, out: torch.Tensor, attribute: str) -> torch.Tensor:
        if self._blocks is not None:
            out = torch.ops.mkldnn._linear_pointwise(rows, self._blocks, self.bias, attribute, [], "")
        else:
            torch.mm(rows, self.weight.t(), out=out)
            if self.bias is not None:
                out.add_(self.bias)
        return self._adapted(out, rows)

    def _adapted(self, out: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        if self._adapter is not None:
            self._adapter.add_to(out, rows)
        return out
