"""Kill a run at random moments, tear its newest checkpoint, start it again; compare the end with an undisturbed run.

    python tools/bench/chaos.py [--kills 200] [--rollouts 40] [--seed 0] [--ranks 1]

The run trains a tiny model on recorded samples (--debug-train-only), with a checkpoint after every rollout.  Every life
is a driver that is killed with SIGKILL after a random time; with several ranks, which are Ray actors, it is the
driver or one of them: the driver must then name the rank and end by itself.  Lives write their checkpoints in the
background or not, as the dice fall.  After every third death one file of the newest checkpoint is cut short at a random
length: the next life must name it and go on from the one before.  A run that ends before there were enough kills is
followed by another one; each is compared.  Prints one JSON line.  ``lost`` and ``twice`` count optimizer steps that are
missing from ``metrics.jsonl`` or in it twice; ``bit_equal`` compares all metrics and all tensors of the model.
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
import traceback
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "recipes"))

from process_tree import tree

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
    ranks: int = 1

    def flags(self, run: Path, *extra: str) -> list[str]:
        return [
            *("train", "--train-backend", "fsdp", "--actor-num-gpus-per-node", str(self.ranks), "--device", "cpu"),
            *("--hf-checkpoint", str(self.folder / "model"), "--save", str(run), "--save-interval", "1"),
            *("--load-debug-rollout-data", str(self.folder / "samples" / "{rollout_id}.jsonl")),
            *("--num-rollout", str(self.rollouts), "--rollout-batch-size", "4", "--n-samples-per-prompt", "4"),
            *("--num-steps-per-rollout", "2", "--use-dynamic-batch-size", "--max-tokens-per-gpu", "256"),
            *("--lr", "1e-3", "--rm-type", "deterministic_random", "--train-num-threads", "1"),
            *("--save-keep-last", "3", "--skip-broken-checkpoints", *extra),
        ]

    def begin(self, run: Path, *extra: str) -> int:
        """Start a life of it; its pid."""
        return _life(self.flags(run, *extra), run.with_suffix(".log"), forked=self.ranks == 1)

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


def _life(arguments: list[str], log: Path, *, forked: bool = True) -> int:
    """Pid of a process that runs ``miles``: ``forked`` with everything imported, or a new one, which Ray needs."""
    if not forked:
        command = [str(Path(sys.executable).with_name("miles")), *arguments]
        with log.open("ab") as out:
            streams = [(os.POSIX_SPAWN_DUP2, out.fileno(), stream) for stream in (1, 2)]
            return os.posix_spawn(command[0], command, os.environ, file_actions=streams)
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    with log.open("ab", buffering=0) as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    status = 1
    try:
        status = miles(arguments)
    except BaseException:
        traceback.print_exc()
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
    pid = job.begin(run, "--save-hf", export)
    status, first = _wait(pid, 0.002), 0.0
    while status is None and not _latest(run):
        status, first = _wait(pid, 0.002), time.monotonic() - begun
    status = _wait(pid, DEADLINE_S) if status is None else status
    if status != 0:
        raise SystemExit(log.read_text()[-4000:])
    return first, time.monotonic() - begun


def _kill(driver: int, log: Path, dice: random.Random) -> str:
    """Kill the driver or one of the ranks that are processes of their own, and say which; return when the run is over.

    A rank that is killed is named by the driver, if it had begun to work and the run was not over anyway.
    """
    ranks = [pid for pid in tree(driver) if b"RoleWorker" in _command_line(pid)]
    victim = dice.choice([driver, *ranks])
    said = log.stat().st_size
    with contextlib.suppress(ProcessLookupError):  # it was just ending
        os.kill(victim, signal.SIGKILL)
    if victim == driver:
        os.waitpid(driver, 0)
        return "driver"
    status = _wait(driver, DEADLINE_S)
    new = log.read_bytes()[said:]
    if status is None or (status and b"of the actor has died" not in new and b"could not be started" not in new):
        raise SystemExit(f"a rank was killed; the driver ended with {status}:\n{new.decode(errors='replace')[-4000:]}")
    return "rank" if status else "rank of a run that was over"


def _command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:  # it has just ended
        return b""


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


@dataclass
class Pace:
    """How fast a run goes: what else the machine has to do changes that."""

    longest_s: float
    """Latest moment of a life for its kill."""


def disturbed(job: Job, run: Path, export: str, kills: int, pace: Pace, dice: random.Random) -> Counter[str]:
    """Start and kill until there were enough kills or the run has ended; then let it end.  What happened, counted."""
    torn, victims = Counter[str](), Counter[str]()
    done = killed = ended_early = advanced = 0
    log = run.with_suffix(".log")
    while killed < kills:
        extra = ("--async-save",) if dice.random() < 0.5 else ()
        before, begun = _latest(run), time.monotonic()
        pid = job.begin(run, "--save-hf", export, *extra)
        status = _wait(pid, dice.uniform(0.05, pace.longest_s))
        if status is None:
            victims[_kill(pid, log, dice)] += 1
            killed += 1
            advanced += _latest(run) != before
        elif status == 0:
            ended_early += 1
            if killed == 0:
                pace.longest_s = min(pace.longest_s, time.monotonic() - begun)
            break
        else:
            raise SystemExit(f"a life ended with {status}:\n{log.read_text()[-4000:]}")
        if killed % 3 == 0 and (name := _tear(run, dice)) is not None:
            torn[name] += 1
    if not ended_early:
        done = _wait(job.begin(run, "--save-hf", export), DEADLINE_S) or 0
    said = log.read_text(errors="replace")
    named = said.count("is unusable") + said.count("expected the number")
    report = {"runs": 1, "kills": killed, "lives_that_advanced": advanced, "named": named, "failed": done != 0}
    counted = {f"torn {name}": count for name, count in torn.items()}
    counted |= {f"killed {name}": count for name, count in victims.items()}
    return Counter(report) + Counter(counted)


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
    parser.add_argument("--ranks", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(1)  # forked lives cannot use the parent's thread pool
    dice = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        job = Job(Path(folder), options.rollouts, options.ranks)
        job.record()
        quiet, quiet_export = Path(folder) / "quiet", str(Path(folder) / "quiet-hf")
        first_s, whole_s = undisturbed(job, quiet, quiet_export)
        pace = Pace(2.0 * first_s + 2.0 * (whole_s - first_s) / options.rollouts)
        counted, start = Counter[str](), time.monotonic()
        while counted["kills"] < options.kills:
            run = Path(folder) / f"chaos-{counted['runs']}"
            counted += disturbed(job, run, f"{run}-hf", options.kills - counted["kills"], pace, dice)
            counted += compared(run, f"{run}-hf", quiet, quiet_export)
        result = {
            "bench": "chaos",
            "rollouts": options.rollouts,
            "ranks": options.ranks,
            "undisturbed_seconds": round(whole_s, 1),
            "seconds": round(time.monotonic() - start, 1),
            **{name: counted[name] for name in ("runs", "kills", "lives_that_advanced", "named", "failed")},
            "victims": {name[7:]: count for name, count in sorted(counted.items()) if name.startswith("killed ")},
            "torn_files": {name[5:]: count for name, count in sorted(counted.items()) if name.startswith("torn ")},
            **{name: counted[name] for name in ("lost", "twice")},
            "bit_equal": not counted["different"],
        }
    print(json.dumps(result))
    sys.exit(not result["bit_equal"])


if __name__ == "__main__":
    main()
