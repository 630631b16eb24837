"""Files on a disk that trainer and engines share: slow, and works everywhere."""

from __future__ import annotations

import shutil
from pathlib import Path

from safetensors.torch import save_file

from miles.core.weights.bucket import Bucket
from miles.core.weights.engine_client import EngineFleet


class DiskTransport:
    """Buckets as safetensors files under ``run_dir/weights``, loaded by ``/update_weights_from_disk``."""

    def __init__(self, run_dir: Path) -> None:
        self._root = run_dir / "weights"
        self._files = 0

    def send(self, bucket: Bucket, fleet: EngineFleet, version: int) -> int:
        """Write one file; the engines read all of them in ``commit``."""
        directory = self._root / f"version_{version}"
        if self._files == 0:
            shutil.rmtree(directory, ignore_errors=True)
            directory.mkdir(parents=True)
        tensors = {
            slot.name: tensor.cpu().contiguous() for slot, tensor in zip(bucket.slots, bucket.tensors, strict=True)
        }
        save_file(tensors, directory / f"model-{self._files:05d}.safetensors")
        self._files += 1
        return bucket.nbytes

    def commit(self, fleet: EngineFleet, version: int) -> None:
        """Let the engines load the version, then delete it."""
        directory = self._root / f"version_{version}"
        fleet.post("/update_weights_from_disk", {"model_path": str(directory), "weight_version": str(version)})
        shutil.rmtree(directory)
        self._files = 0

    def close(self) -> None:
        shutil.rmtree(self._root, ignore_errors=True)
