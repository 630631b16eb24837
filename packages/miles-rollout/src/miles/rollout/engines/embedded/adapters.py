"""The adapter of the policy: low-rank products that are added to those of its linear layers (arXiv:2106.09685).

It comes in weight updates of its own; the model under it stays as it is on disk.

M = rows, K = inputs, N = outputs of a linear layer, r = rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from miles.core.weights.adapter_form import PARTS, AdapterForm, tensor_name
from miles.rollout.engines.embedded.weights import WeightError, WeightStore


class LowRank:
    """``scale * (x A^T) B^T`` for some ranges of a linear layer's outputs.

    The parts read the same rows, so their A are one product.  Rows have the same bits whatever their number, when that
    is a multiple of four, as in other products of the engine.
    """

    def __init__(self, parts: Sequence[range], inputs: int, form: AdapterForm, dtype: torch.dtype) -> None:
        rank = form.rank
        self._scale = form.scale
        self._down = torch.zeros(len(parts) * rank, inputs, dtype=dtype)
        self._parts = [
            (
                slice(part.start, part.stop),
                slice(number * rank, (number + 1) * rank),
                torch.zeros(len(part), rank, dtype=dtype),
            )
            for number, part in enumerate(parts)
        ]

    def add_to(self, out: torch.Tensor, rows: torch.Tensor) -> None:
        """Add to ``out`` [M, N], in place, what the adapter makes of ``rows`` [M, K]."""
        low = torch.mm(rows, self._down.t()).mul_(self._scale)
        for outputs, own, up in self._parts:
            out[:, outputs].addmm_(low[:, own], up.t())

    def views(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A [r, K] and B [outputs, r] of a part."""
        _, own, up = self._parts[number]
        return self._down[own], up


class Host(Protocol):
    """A linear layer of the model."""

    weight: torch.Tensor
    """[N, K]"""

    def attach(self, adapter: LowRank | None) -> None:
        """Add what ``adapter`` computes from now on; None: nothing."""


@dataclass(frozen=True, slots=True, eq=False)
class Place:
    """Where a checkpoint's linear layer is."""

    host: Host
    outputs: range
    """Of the host's."""


class Adapters:
    """Gives a model an adapter, and takes it away.  ``base`` is the checkpoint that lies under adapters."""

    def __init__(self, places: Mapping[str, Place], weights: WeightStore, base: Path) -> None:
        self._places, self._weights, self._base = places, weights, base
        self._form: AdapterForm | None = None

    def facts(self) -> dict[str, Any]:
        """What trainers ask before they send an adapter."""
        return {"layers": list(self._places)}

    def expect(self, form: AdapterForm | None) -> None:
        """The next tensors are those of an adapter of this form; None: whole weights, to which nothing is added.

        An adapter lies over the weights on disk: they are read again, if others came since.  Raises WeightError for
        layers that the model has not.
        """
        if form is None:
            self._attach(None)
            return
        unknown = [layer for layer in form.layers if layer not in self._places]
        if unknown:
            raise WeightError(f"this engine adds no adapter to {unknown[0]} ({len(unknown)} such layers were given)")
        if not self._weights.are_as_loaded:
            self._weights.load_base(self._base)
        if form != self._form:
            self._attach(form)

    def _attach(self, form: AdapterForm | None) -> None:
        for place in self._places.values() if self._form is not None else ():
            place.host.attach(None)
        views: dict[str, torch.Tensor] = {}
        for host, layers in _by_host(self._places, form.layers if form is not None else ()):
            assert form is not None
            outputs = [self._places[layer].outputs for layer in layers]
            adapter = LowRank(outputs, host.weight.shape[1], form, host.weight.dtype)
            host.attach(adapter)
            for number, layer in enumerate(layers):
                names = (tensor_name(layer, part) for part in PARTS)
                views |= dict(zip(names, adapter.views(number), strict=True))
        self._weights.hold_adapter(views)
        self._form = form


def _by_host(places: Mapping[str, Place], layers: Sequence[str]) -> list[tuple[Host, list[str]]]:
    """The layers that each host holds."""
    found: dict[int, tuple[Host, list[str]]] = {}
    for layer in layers:
        host = places[layer].host
        found.setdefault(id(host), (host, []))[1].append(layer)
    return list(found.values())
