"""Kill a run at random moments, tear its newest checkpoint, start it again; compare the end with an undisturbed run.

    python tools/bench/chaos.py [--kills 200] [--rollouts 40] [--seed 0]

The run trains a tiny model on recorded samples (--debug-train-only), with a checkpoint after every rollout.  Every life
is a forked driver that is killed with SIGKILL after a random time; lives write their checkpoints in the background or
not, as the dice fall.  After every third death one file of the newest checkpoint is cut short at a random length: the
next life must name it and go on from the one before.  A run that ends before there were enough kills is followed by
another one; each is compared.  Prints one JSON line.  ``lost`` and ``twice`` count optimizer
steps that are missing from ``metrics.jsonl`` or in it twice; ``bit_equal`` compares all metrics and all tensors of the
model.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "recipes"))

from addition import Task, write_data
from miles.core.cli import main as miles
from miles.fsdp import actor as _imported_before_forking
from tiny_lm import Shape, save_checkpoint

SHAPE = Shape(hidden=32, layers=1, heads=2, kv_heads=1, mlp=64)
DEADLINE_S = 300.0
assert _imported_before_forking


@dataclass(frozen=True)
class Job:
    """A run on recorded samples."""

    folder: Path
    rollouts: int

    def flags(self, run: Path, *extra: str) -> list[str]:
        return [
            *("train", "--train-backend", "fsdp", "--actor-num-gpus-per-node", "1", "--device", "cpu"),
            *("--hf-checkpoint", str(self.folder / "model"), "--save", str(run), "--save-interval", "1"),
            *("--load-debug-rollout-data", str(self.folder / "samples" / "{rollout_id}.jsonl")),
            *("--num-rollout", str(self.rollouts), "--rollout-batch-size", "4", "--n-samples-per-prompt", "4"),
            *("--num-steps-per-rollout", "2", "--use-dynamic-batch-size", "--max-tokens-per-gpu", "256"),
            *("--lr", "1e-3", "--rm-type", "deterministic_random", "--train-num-threads", "1"),
            *("--save-keep-last", "3", "--skip-broken-checkpoints", *extra),
        ]

    def record(self) -> None:
        """The model, and the samples of one generated rollout as those of every rollout."""
        save_checkpoint(self.folder / "model", ["Calculate 814 + 707."] * 20, vocab_size=300, shape=SHAPE, seed=0)
        task = Task(num_digits=2, num_demonstrations=1, num_train=64, num_eval=1)
        data = write_data(self.folder / "data", task, seed=0)
        recorded = self.folder / "samples" / "{rollout_id}.jsonl"
        status = _wait(
            _life(
                [
                    *("train", "--train-backend", "fsdp", "--device", "cpu", "--debug-rollout-only"),
                    *("--hf-checkpoint", str(self.folder / "model"), "--save", str(self.folder / "recording")),
                    *("--prompt-data", str(data.train), "--input-key", "prompt", "--label-key", "label"),
                    *("--apply-chat-template", "--rm-type", "deterministic_random", "--num-rollout", "4"),
                    *("--rollout-batch-size", "4", "--n-samples-per-prompt", "4", "--rollout-max-response-len", "12"),
                    *("--save-debug-rollout-data", str(recorded)),
                ],
                self.folder / "recording.log",
            ),
            DEADLINE_S,
        )
        if status != 0:
            raise SystemExit((self.folder / "recording.log").read_text()[-4000:])
        for rollout_id in range(4, self.rollouts):
            source = Path(str(recorded).format(rollout_id=rollout_id % 4))
            Path(str(recorded).format(rollout_id=rollout_id)).write_bytes(source.read_bytes())


def _life(arguments: list[str], log: Path) -> int:
    """Pid of a forked process that runs ``miles``."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    with log.open("ab", buffering=0) as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    status = 1
    with contextlib.suppress(BaseException):
        status = miles(arguments)
    sys.stdout.flush()
    os._exit(status or 0)


def _wait(pid: int, seconds: float) -> int | None:
    """Exit status; None when the process is still there after that time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    return None


def _latest(run: Path) -> str:
    """What the run names as its newest checkpoint."""
    tracker = run / "latest_checkpointed_iteration.txt"
    return tracker.read_text() if tracker.exists() else ""


def undisturbed(job: Job, run: Path, export: str) -> tuple[float, float]:
    """Seconds until the first checkpoint, and until the end."""
    log, begun = run.with_suffix(".log"), time.monotonic()
    pid = _life(job.flags(run, "--save-hf", export), log)
    status, first = _wait(pid, 0.002), 0.0
    while status is None and not _latest(run):
        status, first = _wait(pid, 0.002), time.monotonic() - begun
    status = _wait(pid, DEADLINE_S) if status is None else status
    if status != 0:
        raise SystemExit(log.read_text()[-4000:])
    return first, time.monotonic() - begun


def _kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def _tear(run: Path, dice: random.Random) -> str | None:
    """Cut a file of the newest checkpoint, or the file that names it; None when no older one would be left."""
    checkpoints = sorted(run.glob("iter_*"))
    if len(checkpoints) < 2:
        return None
    files = [path for path in sorted(checkpoints[-1].rglob("*")) if path.is_file() and path.stat().st_size]
    files.append(run / "latest_checkpointed_iteration.txt")
    victim = dice.choice(files)
    length = 0 if victim == files[-1] else dice.randrange(victim.stat().st_size)
    with victim.open("r+b") as file:
        file.truncate(length)
    return victim.name


def events(run: Path) -> list[dict[str, object]]:
    """Everything logged but what measures time."""
    found = []
    for line in (run / "metrics.jsonl").read_text().splitlines():
        event = json.loads(line)
        del event["time"]
        event["metrics"] = {name: x for name, x in event["metrics"].items() if not name.startswith("perf/")}
        found.append(event)
    return found


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(load_file(folder / "model.safetensors"))


def disturbed(job: Job, run: Path, export: str, kills: int, longest_s: float, dice: random.Random) -> Counter[str]:
    """Start and kill until there were enough kills or the run has ended; then let it end.  What happened, counted."""
    torn: Counter[str] = Counter()
    done = killed = ended_early = advanced = 0
    log = run.with_suffix(".log")
    while killed < kills:
        extra = ("--async-save",) if dice.random() < 0.5 else ()
        before = _latest(run)
        pid = _life(job.flags(run, "--save-hf", export, *extra), log)
        status = _wait(pid, dice.uniform(0.05, longest_s))
        if status is None:
            _kill(pid)
            killed += 1
            advanced += _latest(run) != before
        elif status == 0:
            ended_early += 1
            break
        else:
            raise SystemExit(f"a life ended with {status}:\n{log.read_text()[-4000:]}")
        if killed % 3 == 0 and (name := _tear(run, dice)) is not None:
            torn[name] += 1
    if not ended_early:
        done = _wait(_life(job.flags(run, "--save-hf", export), log), DEADLINE_S) or 0
    said = log.read_text(errors="replace")
    named = said.count("is unusable") + said.count("expected the number")
    report = {"runs": 1, "kills": killed, "lives_that_advanced": advanced, "named": named, "failed": done != 0}
    return Counter(report) + Counter({f"torn {name}": count for name, count in torn.items()})


def compared(run: Path, export: str, quiet: Path, quiet_export: str) -> Counter[str]:
    """Steps that are missing or doubled, and whether anything else differs from the undisturbed run."""
    expected, found = events(quiet), events(run)
    steps = Counter(event["step"] for event in found if event["kind"] == "train")
    ours, theirs = weights(Path(export)), weights(Path(quiet_export))
    same = found == expected and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    lost = sum(1 for event in expected if event["kind"] == "train" and event["step"] not in steps)
    return Counter({"lost": lost, "twice": sum(count - 1 for count in steps.values()), "different": not same})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--rollouts", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)  # forked lives cannot use the parent's thread pool
    dice = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        job = Job(Path(folder), options.rollouts)
        job.record()
        quiet, quiet_export = Path(folder) / "quiet", str(Path(folder) / "quiet-hf")
        first_s, whole_s = undisturbed(job, quiet, quiet_export)
        longest_s = 2.0 * first_s + 2.0 * (whole_s - first_s) / options.rollouts
        counted, start = Counter[str](), time.monotonic()
        while counted["kills"] < options.kills:
            run = Path(folder) / f"chaos-{counted['runs']}"
            counted += disturbed(job, run, f"{run}-hf", options.kills - counted["kills"], longest_s, dice)
            counted += compared(run, f"{run}-hf", quiet, quiet_export)
        result = {
            "bench": "chaos",
            "rollouts": options.rollouts,
            "undisturbed_seconds": round(whole_s, 1),
            "seconds": round(time.monotonic() - start, 1),
            **{name: counted[name] for name in ("runs", "kills", "lives_that_advanced", "named", "failed")},
            "torn_files": {name[5:]: count for name, count in sorted(counted.items()) if name.startswith("torn ")},
            **{name: counted[name] for name in ("lost", "twice")},
            "bit_equal": not counted["different"],
        }
    print(json.dumps(result))
    sys.exit(not result["bit_equal"])


if __name__ == "__main__":
    main()
