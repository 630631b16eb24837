"""The engine's weights under their Hugging Face names: reading, writing, checking."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from miles.core.errors import EngineError
from miles.core.weights.checksum import checksum, copy
from miles.core.weights.delta import Change
from miles.core.weights.delta_code import apply
from miles.core.weights.shared_ring import Incoming

_DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float64": torch.float64,
    "int64": torch.int64,
    "int32": torch.int32,
    "int8": torch.int8,
    "uint8": torch.uint8,
    "bool": torch.bool,
}


class WeightError(EngineError):
    """Weights were offered that this model cannot take.  Names the tensor."""


class WeightStore:
    """Named destinations inside a model.

    A destination is a view of the model's own memory, so writing is copying, and a model may hold tensors in another
    layout than their names suggest.  ``aliases`` are names that checkpoints use for a tensor held under another one;
    ``copies`` are further places of a tensor, into which it is broadcast; ``fused`` are names under which several
    tensors may come as one, with the names of the several.
    """

    def __init__(
        self,
        views: Mapping[str, torch.Tensor],
        aliases: Mapping[str, str] | None = None,
        copies: Mapping[str, torch.Tensor] | None = None,
        fused: Mapping[str, tuple[torch.Tensor, list[str]]] | None = None,
    ) -> None:
        self._views = dict(views)
        self._fused = dict(fused or {})
        self._aliases = dict(aliases or {})
        self._copies = dict(copies or {})
        self._adapter: dict[str, torch.Tensor] = {}
        self.num_writes = 0
        """Grows with every change of the model's own tensors."""
        self._num_loaded: int | None = None
        self.unsent: set[str] = set()
        """Tensors whose memory was released and that have not been written since."""
        self._released: list[tuple[torch.UntypedStorage, int]] = []

    @property
    def num_bytes(self) -> int:
        """Size of all tensors."""
        return sum(int(view.nbytes) for view in self._views.values())

    @property
    def are_as_loaded(self) -> bool:
        """Whether the model's own tensors are those of its checkpoint."""
        return self.num_writes == self._num_loaded and not self.unsent

    def hold_adapter(self, views: Mapping[str, torch.Tensor]) -> None:
        """Updates bring these tensors, which lie beside the model's own, from now on; none: the model's own."""
        self._adapter = dict(views)

    def load_base(self, directory: Path) -> None:
        """Copy the checkpoint in that adapters are for."""
        adapter, self._adapter = self._adapter, {}
        try:
            self.load_directory(directory)
        finally:
            self._adapter = adapter
        self.note_loaded()

    def note_loaded(self) -> None:
        """The model's own tensors are those of the checkpoint."""
        self._num_loaded = self.num_writes

    def release(self) -> int:
        """Free the memory of all tensors; the bytes that were freed.  Until ``restore`` nothing is read or written."""
        storages = {view.untyped_storage().data_ptr(): view.untyped_storage() for view in self._places()}
        self._released = [(storage, storage.nbytes()) for storage in storages.values()]
        for storage, _ in self._released:
            storage.resize_(0)
        self.unsent = set(self._views)
        return sum(num_bytes for _, num_bytes in self._released)

    def restore(self) -> None:
        """Take the memory again; what is in it has to be written."""
        for storage, num_bytes in self._released:
            storage.resize_(num_bytes)
        self._released = []
        self.num_writes += 1

    def _places(self) -> Iterator[torch.Tensor]:
        yield from self._views.values()
        yield from self._copies.values()

    def names(self) -> list[str]:
        """Every tensor once, in the model's order, and those of an adapter."""
        return [*self._views, *self._adapter]

    def updated_names(self) -> list[str]:
        """The tensors that an update brings."""
        return list(self._adapter or self._views)

    def read(self, name: str) -> torch.Tensor:
        """The tensor as a checkpoint would hold it, in the engine's precision."""
        return self._view(name).contiguous()

    def write(self, name: str, tensor: torch.Tensor | Incoming) -> str:
        """Copy ``tensor`` in; raise WeightError for an unknown name or another shape.

        Returns the checksum of what is held then, in the tensor's dtype.
        """
        self._check_shape(name, tensor.shape)
        view = self._view(name)
        held = tensor.copy_into(view) if isinstance(tensor, Incoming) else copy(view, tensor)
        if name in self._adapter:
            return held
        self.num_writes += 1
        if self.unsent:
            self.unsent.difference_update(self._held_under(name))
        if name in self._copies:
            self._copies[name].copy_(view)
        return held

    def checksum(self, name: str, dtype: torch.dtype | None = None) -> str:
        """Of the bytes held, as ``dtype`` (default: as held)."""
        held = self.read(name)
        return checksum(held.to(dtype or held.dtype))

    def patch(self, name: str, change: torch.Tensor, dtype: torch.dtype, count: int) -> None:
        """Make a change of ``count`` elements of the tensor in ``dtype``; raise WeightError when it is none."""
        held = self.read(name)
        changed = held.to(dtype).clone(memory_format=torch.contiguous_format)
        try:
            apply(change, count, changed)
        except ValueError as error:
            raise WeightError(f"{name}: {error}") from error
        self.write(name, changed)

    def take(
        self, tensors: Iterable[tuple[str, torch.Tensor | Incoming]], change: Change | None = None
    ) -> dict[str, str]:
        """Copy whole tensors in and apply changes.  Returns the checksum of each as held then, in its own dtype.

        Nothing is written unless every name and shape is right.
        """
        tensors = list(tensors)
        entries = {} if change is None else change.entries
        self.check([(name, tensor.shape) for name, tensor in tensors], change)
        held, dtypes = {}, {}
        for name, tensor in tensors:
            if name in entries:
                dtypes[name] = parse_dtype(entries[name][0])
                whole = tensor.whole() if isinstance(tensor, Incoming) else tensor
                self.patch(name, whole, dtypes[name], entries[name][1])
            else:
                dtypes[name] = tensor.dtype
                held[name] = self.write(name, tensor)
        places = [place for name in dtypes for place in self._held_under(name)]
        if len(set(places)) < len(places):  # the first of two tensors for one place is not held any more
            held = {}
        return held | self.checksums({name: dtype for name, dtype in dtypes.items() if name not in held})

    def check(self, shapes: Iterable[tuple[str, Sequence[int]]], change: Change | None = None) -> None:
        """Raise WeightError for unknown names and for other shapes than the model's; changes have none."""
        shapes = list(shapes)
        unknown = [name for name, _ in shapes if self._find(name) is None]
        if unknown:
            raise WeightError(f"this model has no {_some(unknown)}")
        for name, shape in shapes:
            if change is None or name not in change.entries:
                self._check_shape(name, shape)

    def take_files(self, directory: Path, change: Change) -> dict[str, str]:
        """Apply the changes that a directory's safetensors hold."""
        checksums: dict[str, str] = {}
        for name, handle in _tensors(checkpoint_files(directory)):
            checksums |= self.take([(name, handle.get_tensor(name))], change)
        return checksums

    def checksums(self, dtypes: Mapping[str, torch.dtype]) -> dict[str, str]:
        """``checksum`` of several tensors, in these dtypes."""
        return {name: self.checksum(name, dtype) for name, dtype in dtypes.items()}

    def load_directory(self, directory: Path) -> dict[str, torch.dtype]:
        """Copy a checkpoint's safetensors in; raise WeightError when a tensor is missing or unknown.

        Returns the dtypes of the files' tensors.
        """
        files = checkpoint_files(directory)
        missing = set(self.updated_names())
        for name, handle in _tensors(files):  # everything is checked before anything is written
            self._check_shape(name, tuple(handle.get_slice(name).get_shape()))
            missing.difference_update(self._held_under(name))
        if missing:
            raise WeightError(f"{directory} lacks {_some(sorted(missing))}")
        dtypes = {}
        for name, handle in _tensors(files):
            tensor = handle.get_tensor(name)
            dtypes[name] = tensor.dtype
            self.write(name, tensor)
        return dtypes

    def _check_shape(self, name: str, shape: Sequence[int]) -> None:
        held = self._view(name).shape
        if tuple(held) != tuple(shape):
            raise WeightError(f"{name}: the model holds {list(held)}, the update has {list(shape)}")

    def _held_under(self, name: str) -> list[str]:
        """The tensors that come under ``name``: one, or those that are fused."""
        return self._fused[name][1] if name in self._fused else [self._aliases.get(name, name)]

    def _view(self, name: str) -> torch.Tensor:
        if self._released:
            raise WeightError("the memory of the weights is released; call /resume_memory_occupation first")
        view = self._find(name)
        if view is None:
            raise WeightError(f"this model has no tensor {name!r}")
        return view

    def _find(self, name: str) -> torch.Tensor | None:
        if name in self._fused:
            return self._fused[name][0]
        if name in self._adapter:
            return self._adapter[name]
        return self._views.get(self._aliases.get(name, name))


def checkpoint_files(directory: Path) -> list[Path]:
    """The safetensors files of a checkpoint; raise WeightError when one is missing."""
    index = directory / "model.safetensors.index.json"
    if not index.exists():
        files = sorted(directory.glob("*.safetensors"))
        if not files:
            raise WeightError(f"{directory} holds no *.safetensors: the engine reads safetensors checkpoints")
        return files
    files = [directory / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    for file in files:
        if not file.exists():
            raise WeightError(f"{file} does not exist, though {index.name} names it")
    return files


def _tensors(files: list[Path]) -> Iterator[tuple[str, Any]]:
    """Each tensor's name with the open file that holds it."""
    for file in files:
        with safe_open(str(file), framework="pt") as handle:
            for name in handle.keys():  # noqa: SIM118 - not a mapping
                if not name.endswith("rotary_emb.inv_freq"):  # a constant that old checkpoints carry
                    yield name, handle


def parse_dtype(name: str) -> torch.dtype:
    """``float32`` or ``torch.float32``; raise WeightError for what tensors cannot be."""
    dtype = _DTYPES.get(name.removeprefix("torch."))
    if dtype is None:
        raise WeightError(f"unknown dtype {name!r}; one of {', '.join(_DTYPES)}")
    return dtype


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"
