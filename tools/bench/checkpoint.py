"""Writing a checkpoint: bytes per second against those of the disk, and how long training waits with --async-save.

    python tools/bench/checkpoint.py [--megabytes 512] [--directory DIR]

The disk's figure is one file of the same bytes, written and flushed, on the same file system in the same run.  Prints
one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

import torch

from miles.core.driver.checkpoint import DriverState
from miles.core.driver.saving import Saver
from miles.core.training.writing import Writer
from miles.fsdp.checkpoint import write_tensors


def disk_seconds(directory: Path, tensors: dict[str, torch.Tensor]) -> float:
    start = time.perf_counter()
    with (directory / "raw").open("wb") as file:
        for tensor in tensors.values():
            file.write(tensor.numpy().data)
        file.flush()
        os.fsync(file.fileno())
    return time.perf_counter() - start


def save_seconds(directory: Path, tensors: dict[str, torch.Tensor], *, in_background: bool) -> tuple[float, float]:
    """Until training goes on, and until the checkpoint is in force."""
    writer = Writer.of_ranks(in_background=in_background)
    saver = Saver(directory, writer.finish, keep=1, in_background=in_background)
    start = time.perf_counter()
    state = DriverState(rollout_id=int(in_background), metrics_offset=0)
    saver.save(state, lambda partial: write_tensors(writer, partial.actor, tensors))
    waited = time.perf_counter() - start
    saver.wait()
    return waited, time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=512)
    parser.add_argument("--directory", help="where to write; default: the directory for temporary files")
    flags = parser.parse_args()
    tensors = {f"layer.{i}": torch.randn(2**20) for i in range(flags.megabytes // 4)}
    with tempfile.TemporaryDirectory(dir=flags.directory) as folder:
        disk = disk_seconds(Path(folder), tensors)
        _, plain = save_seconds(Path(folder), tensors, in_background=False)
        waited, background = save_seconds(Path(folder), tensors, in_background=True)
    print(
        json.dumps(
            {
                "bench": "checkpoint",
                "megabytes": flags.megabytes,
                "disk_mb_per_s": round(flags.megabytes / disk, 1),
                "save_mb_per_s": round(flags.megabytes / plain, 1),
                "share_of_disk": round(disk / plain, 2),
                "async_training_waits_s": round(waited, 3),
                "async_in_force_after_s": round(background, 3),
                "save_s": round(plain, 3),
            }
        )
    )


if __name__ == "__main__":
    main()
