"""The weights of a run's versions, as Hugging Face directories.  A version is the number of rollouts trained on."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from miles.core.config import Config
from miles.core.errors import DataError
from miles.core.protocols.backend import Rank, TrainBackend
from miles.core.registry import Registry
from miles.core.run_directory import RunDirectory

_CHECKPOINT = re.compile(r"iter_(\d+)")
_ONE_RANK = {
    "actor_num_nodes": 1,
    "actor_num_gpus_per_node": 1,
    "tensor_model_parallel_size": 1,
    "pipeline_model_parallel_size": 1,
    "context_parallel_size": 1,
    "expert_model_parallel_size": 1,
    "save": None,
    "load": None,
}


class Weights:
    """What is there of a run: the checkpoint it started from, its own checkpoints, and directories given by hand."""

    def __init__(self, run: RunDirectory, given: Mapping[int, Path]) -> None:
        self._run, self._given = run, given
        self._flags = run.read_config()
        if not self._flags:
            raise DataError(f"{run.path}: there is no config.json; expected the directory of a run (--save)")
        self._checkpoints = {
            int(match[1]) + 1: path / "actor"
            for path in run.path.glob("iter_*")
            if (match := _CHECKPOINT.fullmatch(path.name)) and (path / "actor").is_dir()
        }

    def versions(self) -> list[int]:
        """Versions whose weights can be loaded, in order."""
        return sorted({0, *self._checkpoints, *self._given})

    @contextmanager
    def directory(self, version: int) -> Iterator[Path]:
        """The weights of ``version`` in Hugging Face form; exported by the training backend where they must be."""
        if version in self._given:
            yield self._given[version]
        elif version in self._checkpoints:
            with tempfile.TemporaryDirectory(prefix="miles-weights-") as directory:
                self._export(self._checkpoints[version], Path(directory) / "hf")
                yield Path(directory) / "hf"
        else:
            yield Path(self._flags["hf_checkpoint"])

    @property
    def tokenizer(self) -> Path:
        return Path(self._flags["hf_checkpoint"])

    def flag(self, name: str, default: Any = None) -> Any:
        """Value of a flag of the run."""
        return self._flags.get(name, default)

    def _export(self, checkpoint: Path, target: Path) -> None:
        config = Config.of(**(self._typed_flags() | {name: v for name, v in _ONE_RANK.items() if name in self._flags}))
        backend: TrainBackend = Registry("miles.train_backends").get(self._flags["train_backend"])()
        actor = backend.create(config, Rank())
        try:
            actor.load(checkpoint)
            target.mkdir()
            actor.save_hf(target)
        finally:
            actor.close()

    def _typed_flags(self) -> dict[str, Any]:
        entries = json.loads(self._run.config.read_text(encoding="utf-8"))
        return {name: entry["value"] for name, entry in entries.items() if entry["origin"] in ("flag", "file")}
