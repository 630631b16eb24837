"""Conversion between Hugging Face and torch_dist against copying the same files.

    python tools/bench/conversion.py [--layers 14] [--hidden 2048] [--experts 0] [--rounds 3]

A Qwen3 (or, with experts, a Qwen3-MoE) of random weights in bf16 is converted there and back, and its file copied, each
in a process of its own, by turns, several times.  One JSON line: gigabytes per second of processor and of clock,
without and with the self-check (which reads the result back), what share of the copy's that is, from the fastest round
of each; and the most anonymous memory that a conversion took beyond what it began with, in any round.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from miles.megatron import cpu

cpu.install()

import torch  # noqa: E402

from miles.core.config import Config  # noqa: E402
from miles.megatron.converter import outline_of, to_hf, to_torch_dist  # noqa: E402
from miles.megatron.streamed_files import write_safetensors  # noqa: E402


def main() -> None:
    flags = parse_flags()
    Config.of(train_backend="megatron")  # finds plugins and flags, once in a process: like imports, not counted
    with tempfile.TemporaryDirectory(dir=flags.directory) as work:
        print(json.dumps({"bench": "conversion", **measure(flags, Path(work))}))


def parse_flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=14)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--experts", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--directory", type=Path, help="where files are written (default: the system's)")
    return parser.parse_args()


def measure(flags: argparse.Namespace, work: Path) -> dict[str, Any]:
    source = work / "source"
    alone(lambda: make_checkpoint(flags, source))
    size = (source / "model.safetensors").stat().st_size
    there, back, copy = work / "there", work / "back", work / "copy"
    jobs: dict[str, tuple[Path, Callable[[], Any]]] = {
        "copy": (copy, lambda: shutil.copyfile(source / "model.safetensors", make(copy) / "model.safetensors")),
        "to_torch_dist_checked": (there, lambda: to_torch_dist(source, there)),
        "to_torch_dist": (there, lambda: to_torch_dist(source, there, check=False)),
        "to_hf": (back, lambda: to_hf(source, there, back, check=False)),
        "to_hf_checked": (back, lambda: to_hf(source, there, back)),
    }
    rounds: dict[str, list[tuple[float, float, int]]] = {name: [] for name in jobs}
    for _ in range(flags.rounds):
        for name, (output, job) in jobs.items():
            shutil.rmtree(output, ignore_errors=True)
            rounds[name].append(alone(job))
    cpu = {name: min(used for used, _, _ in every) for name, every in rounds.items()}
    wall = {name: min(took for _, took, _ in every) for name, every in rounds.items()}
    speeds = {
        name: {
            "gb_per_cpu_s": round(size / 1e9 / cpu[name], 2),
            "gb_per_s": round(size / 1e9 / wall[name], 2),
            "share_of_copy_cpu": round(cpu["copy"] / cpu[name], 2),
            "share_of_copy_wall": round(wall["copy"] / wall[name], 2),
            "peak_extra_mb": round(max(extra for _, _, extra in rounds[name]) / 1e6),
        }
        for name in jobs
    }
    return {"gigabytes": round(size / 1e9, 2), **speeds}


def make(directory: Path) -> Path:
    directory.mkdir()
    return directory


def make_checkpoint(flags: argparse.Namespace, directory: Path) -> None:
    directory.mkdir()
    config = {
        "model_type": "qwen3_moe" if flags.experts else "qwen3",
        "dtype": "bfloat16",
        "vocab_size": 32000,
        "hidden_size": flags.hidden,
        "intermediate_size": 3 * flags.hidden,
        "num_hidden_layers": flags.layers,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": flags.hidden // 8,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "num_experts": flags.experts or None,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": flags.hidden // 2,
        "norm_topk_prob": True,
    }
    (directory / "config.json").write_text(json.dumps(config))
    with outline_of(directory) as outline:
        names = outline.hf_outline()
        values = ((name, torch.randn(like.shape, dtype=torch.float32).to(like.dtype)) for name, like in names)
        write_safetensors(directory, names, values)


def alone(job: Callable[[], Any]) -> tuple[float, float, int]:
    """CPU-seconds, seconds and additional bytes of ``job``, in a process that was forked for it."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=lambda: sender.send(timed(job)))
    process.start()
    sender.close()  # so that the end of the process ends the wait
    result: tuple[float, float, int] = receiver.recv()
    process.join()
    return result


def timed(job: Callable[[], Any]) -> tuple[float, float, int]:
    torch.set_num_threads(1)
    watch = MemoryWatch()
    wall, used = time.perf_counter(), time.process_time()
    job()
    return time.process_time() - used, time.perf_counter() - wall, watch.stop()


class MemoryWatch:
    """The most anonymous memory of this process beyond what it has now; mapped files do not count."""

    def __init__(self) -> None:
        self._began = self._most = self._now()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> int:
        self._done.set()
        self._thread.join()
        return self._most - self._began

    def _watch(self) -> None:
        while not self._done.wait(0.02):
            self._most = max(self._most, self._now())

    @staticmethod
    def _now() -> int:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("RssAnon"):
                return int(line.split()[1]) * 1024
        raise RuntimeError("this system does not tell anonymous memory")


if __name__ == "__main__":
    main()
