"""Files on a disk that trainer and engines share: slow, and works everywhere."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from miles.core.weights.bucket import Bucket, compare
from miles.core.weights.checksum import checksum
from miles.core.weights.delta import Change
from miles.core.weights.engine_client import EngineFleet, held_checksums

DESCRIPTION = "miles.json"
"""Beside the files: which of their tensors are changes, and of what."""


class DiskTransport:
    """Buckets as safetensors files under ``run_dir/weights``, loaded by ``/update_weights_from_disk``."""

    def __init__(self, run_dir: Path) -> None:
        self._root = run_dir.absolute() / "weights"
        self._files = 0
        self._checksums: dict[str, str] = {}
        self._change: Change | None = None

    def send(self, bucket: Bucket, fleet: EngineFleet, version: int) -> int:
        """Write one file; the engines read all of them in ``commit``."""
        directory = self._directory(version)
        if self._files == 0:
            shutil.rmtree(directory, ignore_errors=True)
            directory.mkdir(parents=True)
            self._checksums, self._change = {}, None
        tensors = {name: tensor.cpu().contiguous() for name, tensor in bucket.named}
        save_file(tensors, directory / f"model-{self._files:05d}.safetensors")
        self._files += 1
        self._checksums |= {
            name: bucket.whole_checksums.get(name) or checksum(tensor) for name, tensor in tensors.items()
        }
        if bucket.change is not None:
            earlier = self._change.entries if self._change is not None else {}
            self._change = Change(bucket.change.base_version, earlier | bucket.change.entries)
        return bucket.payload_bytes

    def commit(self, fleet: EngineFleet, version: int) -> None:
        """Let the engines load the version, compare checksums with those that report them, then delete it."""
        if self._files == 0:
            return
        directory = self._directory(version)
        body: dict[str, Any] = {"model_path": str(directory), "flush_cache": False}
        if self._change is not None:
            body["delta"] = self._change.to_json()
        # SGLang passes on nothing but the directory.
        (directory / DESCRIPTION).write_text(json.dumps({"delta": body.get("delta")}), encoding="utf-8")
        self._files = 0  # files of an update that fails are no part of the next one
        answers = fleet.post("/update_weights_from_disk", body)
        for url, answer in zip(fleet.urls, answers, strict=True):
            if checksums := held_checksums(answer):
                compare(url, self._checksums, checksums)
        shutil.rmtree(directory)

    def close(self) -> None:
        shutil.rmtree(self._root, ignore_errors=True)

    def _directory(self, version: int) -> Path:
        return self._root / f"version_{version}"
