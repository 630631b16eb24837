"""Kill a run at random moments, tear its newest checkpoint, start it again; compare the end with an undisturbed run.

    python tools/bench/chaos.py [--kills 200] [--minutes M] [--rollouts 40] [--seed 0]
        [--ranks 1] [--cluster own] [--engines]

The run trains a tiny model, on recorded samples or on those of an engine (``--engines``), with a checkpoint and an
export after every rollout.  In every life one process is killed with SIGKILL: the driver, or another one, which the
driver must then name before it ends by itself.  It is killed after a random time, or just after a sign that something
is being written, removed or renamed.  Nothing that a life has started may outlive it, whether the next one waits for
that or not, and no shared memory may be left in the end.  Several ranks are Ray actors, in a cluster of the life's own
or in one that stays (``--cluster lasting``).  Lives write their checkpoints in the background or not, as the dice fall.

After every third death one file of the newest checkpoint is cut short at a random length: the next life must name it
and go on from the one before.  A run that ends before there were enough kills is followed by another one; each is
compared.  Prints one JSON line.  ``lost`` and ``twice`` count optimizer steps that are missing from ``metrics.jsonl``
or in it twice; ``bit_equal`` compares all metrics and all tensors of the model; ``interrupted`` says what lay half done
at the moments of the kills.
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
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "recipes"))

from lives import Cluster, Life, ray_cluster

from addition import Task, write_data
from miles.core.driver.checkpoint import TRACKER_FILE
from miles.fsdp import actor as _imported_before_forking
from tiny_lm import Shape, save_checkpoint

SHAPE = Shape(hidden=32, layers=1, heads=2, kv_heads=1, mlp=64)
DEADLINE_S = 300.0
SIGNS = {
    "checkpoint": ".iter_*[0-9a-f].partial",
    "checkpoint without its name": f"{TRACKER_FILE}.partial",
    "removal of an old checkpoint": ".iter_*.removed.partial",
    "export": ".export.*",
    "weights to engines": "weights/version_*",
}
"""What is in a run's directory while something is being done."""
SHARE_STARTING = 0.2
"""Of the lives, that are to be killed before their first checkpoint."""
PATIENCE_S = 1.0
"""For a sign: some are there for less time than it takes to look."""
TOLD = {
    "rank": "of the actor",
    "rollout side": "the rollout side",
    "engine": "engine",
    "router": "router",
}
"""What a driver calls the process that was killed."""
assert _imported_before_forking


@dataclass(frozen=True)
class Job:
    """A run, on recorded samples or with an engine."""

    folder: Path
    rollouts: int
    ranks: int = 1
    engines: bool = False
    cluster: Cluster | None = None

    def flags(self, run: Path, *extra: str) -> list[str]:
        recorded = ("--load-debug-rollout-data", str(self.folder / "samples" / "{rollout_id}.jsonl"))
        return [
            *("train", "--train-backend", "fsdp", "--actor-num-gpus-per-node", str(self.ranks), "--device", "cpu"),
            *("--hf-checkpoint", str(self.folder / "model"), "--save", str(run), "--save-interval", "1"),
            *("--num-rollout", str(self.rollouts), "--rollout-batch-size", "4", "--n-samples-per-prompt", "4"),
            *("--num-steps-per-rollout", "2", "--use-dynamic-batch-size", "--max-tokens-per-gpu", "256"),
            *("--lr", "1e-3", "--rm-type", "deterministic_random", "--train-num-threads", "1"),
            *("--save-keep-last", "3", "--skip-broken-checkpoints", "--save-hf", str(run / "export")),
            *(self._generating() if self.engines else recorded),
            *extra,
        ]

    def _generating(self) -> list[str]:
        return [
            *("--prompt-data", str(self.folder / "data" / "train.jsonl"), "--input-key", "prompt"),
            *("--label-key", "label", "--apply-chat-template", "--rollout-shuffle"),
            *("--rollout-max-response-len", "12", "--engine-num-threads", "1"),
        ]

    def begin(self, run: Path, *extra: str) -> Life:
        """Start a life of it."""
        return Life.begin(self.flags(run, *extra), run.with_suffix(".log"), self.cluster)

    def record(self) -> None:
        """The model, and the samples of some generated rollouts as those of every rollout."""
        save_checkpoint(self.folder / "model", ["Calculate 814 + 707."] * 20, vocab_size=300, shape=SHAPE, seed=0)
        write_data(self.folder / "data", Task(num_digits=2, num_demonstrations=1, num_train=64, num_eval=1), seed=0)
        if self.engines:
            return
        recorded = self.folder / "samples" / "{rollout_id}.jsonl"
        log = self.folder / "recording.log"
        life = Life.begin(
            [
                *("train", "--train-backend", "fsdp", "--device", "cpu", "--debug-rollout-only"),
                *("--hf-checkpoint", str(self.folder / "model"), "--save", str(self.folder / "recording")),
                *("--rm-type", "deterministic_random", "--num-rollout", "4", *self._generating()),
                *("--rollout-batch-size", "4", "--n-samples-per-prompt", "4"),
                *("--save-debug-rollout-data", str(recorded)),
            ],
            log,
        )
        if life.wait(DEADLINE_S) != 0:
            raise SystemExit(log.read_text()[-4000:])
        for rollout_id in range(4, self.rollouts):
            source = Path(str(recorded).format(rollout_id=rollout_id % 4))
            Path(str(recorded).format(rollout_id=rollout_id)).write_bytes(source.read_bytes())


def _latest(run: Path) -> str:
    """What the run names as its newest checkpoint."""
    tracker = run / TRACKER_FILE
    return tracker.read_text().strip() if tracker.exists() else ""


@dataclass
class Pace:
    """How fast a run goes: what else the machine has to do changes that."""

    start_s: float
    """Until the first checkpoint of the last life that got there."""
    rollout_s: float
    slowest_end_s: float = 0.0
    """Longest time for which something outlived its driver."""


def undisturbed(job: Job, run: Path) -> tuple[Pace, float]:
    """Of a run that is left alone; the second is its seconds."""
    begun = time.monotonic()
    life = job.begin(run)
    status = life.wait(DEADLINE_S, until=lambda: bool(_latest(run)))
    first = time.monotonic() - begun
    status = life.wait(DEADLINE_S) if status is None else status
    if status != 0:
        raise SystemExit(life.log.read_text()[-4000:])
    whole = time.monotonic() - begun
    return Pace(first, (whole - first) / job.rollouts), whole


@dataclass
class Report:
    """What happened to a run."""

    kills: int = 0
    finished: bool = False
    advanced: int = 0
    torn: Counter[str] = field(default_factory=Counter)
    victims: Counter[str] = field(default_factory=Counter)
    interrupted: Counter[str] = field(default_factory=Counter)
    lives: list[Life] = field(default_factory=list)


def _wait_for_the_moment(life: Life, run: Path, pace: Pace, dice: random.Random) -> tuple[int | None, str, int]:
    """Exit status of a driver that ended before, None otherwise; what to kill now, and its process."""
    if dice.random() < SHARE_STARTING:
        status = life.wait(dice.uniform(0.05, pace.start_s))
        return status, *_one_of(life.parts(), dice)
    before, begun = _latest(run), time.monotonic()
    status = life.wait(DEADLINE_S, until=lambda: _latest(run) != before)
    pace.start_s = time.monotonic() - begun
    victim, sign = _one_of(life.parts(), dice), dice.choice([*SIGNS.values(), None])
    if status is None and sign is not None:
        status = life.wait(PATIENCE_S + 2.0 * pace.rollout_s, until=lambda: any(run.glob(sign)))
        time.sleep(dice.choice((0.0, dice.uniform(0.0, 0.02))))
    elif status is None:
        status = life.wait(dice.uniform(0.0, 3.0 * pace.rollout_s))
    return status, *victim


def _one_of(parts: dict[str, list[int]], dice: random.Random) -> tuple[str, int]:
    name = dice.choice(sorted(parts))
    return name, dice.choice(parts[name])


def _kill(life: Life, name: str, victim: int, run: Path) -> tuple[str, list[str]]:
    """Kill it; what that was, and what it has interrupted.  A process that the driver needs is named by the driver."""
    said = life.log.stat().st_size
    with contextlib.suppress(ProcessLookupError):  # it was just ending
        os.kill(victim, signal.SIGKILL)
    interrupted = [what for what, sign in SIGNS.items() if any(run.glob(sign))] or ["nothing on the disk"]
    status = life.wait(DEADLINE_S)
    if name == "driver":
        return name, interrupted
    new = life.log.read_bytes()[said:].decode(errors="replace")
    if status == 0:
        return f"{name} of a run that was over", interrupted
    told = TOLD[name] in new and any(how in new for how in ("has died", "could not be started", "has ended"))
    if status is None or not told:
        raise SystemExit(f"the {name} was killed; the driver ended with {status}:\n{new[-4000:]}")
    return name, interrupted


def _tear(run: Path, dice: random.Random) -> str | None:
    """Cut a file of the newest checkpoint, or the file that names it; None when no older one would be left."""
    checkpoints = sorted(run.glob("iter_*"))
    if len(checkpoints) < 2:
        return None
    files = [path for path in sorted(checkpoints[-1].rglob("*")) if path.is_file() and path.stat().st_size]
    files.append(run / TRACKER_FILE)
    victim = dice.choice(files)
    with victim.open("r+b") as file:
        file.truncate(dice.randrange(victim.stat().st_size))
    return victim.name


def events(run: Path) -> list[dict[str, object]]:
    """Everything logged but what measures time."""
    found = []
    for line in (run / "metrics.jsonl").read_text().splitlines():
        event = json.loads(line)
        del event["time"]
        event["metrics"] = {name: value for name, value in event["metrics"].items() if not _measures_time(name)}
        found.append(event)
    return found


def _measures_time(name: str) -> bool:
    return name.startswith("perf/") or "latency" in name or name.endswith(("_s", "_time"))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(load_file(folder / "model.safetensors"))


def disturbed(job: Job, run: Path, kills: int, deadline: float, pace: Pace, dice: random.Random) -> Report:
    """Start and kill until there were enough kills, it is late, or the run has ended; then let it end."""
    report = Report()
    while report.kills < kills and time.monotonic() < deadline and not report.finished:
        life = job.begin(run, *_choices(job, dice))
        report.lives.append(life)
        before = _latest(run)
        status, name, victim = _wait_for_the_moment(life, run, pace, dice)
        if status is None:
            name, interrupted = _kill(life, name, victim, run)
            report.victims[name] += 1
            report.interrupted.update(interrupted)
            report.kills += 1
            report.advanced += _latest(run) != before
        elif status == 0:
            report.finished = True
        else:
            raise SystemExit(f"a life ended with {status}:\n{life.log.read_text()[-4000:]}")
        if dice.random() < 0.5:  # else the next one begins at once
            pace.slowest_end_s = max(pace.slowest_end_s, life.seconds_to_end())
        if report.kills % 3 == 0 and not report.finished and (torn := _tear(run, dice)) is not None:
            report.torn[torn] += 1
    if not report.finished:
        report.lives.append(job.begin(run))
        report.finished = report.lives[-1].wait(DEADLINE_S) == 0
    _look_for_leftovers(report.lives, run)
    return report


def _choices(job: Job, dice: random.Random) -> list[str]:
    """Flags that change nothing of the result."""
    chosen = ["--async-save"] if dice.random() < 0.5 else []
    return [*chosen, "--update-weight-transport", dice.choice(("shm", "disk"))] if job.engines else chosen


def _look_for_leftovers(lives: list[Life], run: Path) -> None:
    """SystemExit when a life has left a process, shared memory, or something half done."""
    for life in lives:
        life.seconds_to_end()
    left = [path for life in lives for path in life.memory()] + [path for path in run.glob(".*") if path.is_dir()]
    if left:
        raise SystemExit(f"left behind: {left}")


def compared(run: Path, quiet: Path) -> Counter[str]:
    """Steps that are missing or doubled, and whether anything else differs from the undisturbed run."""
    expected, found = events(quiet), events(run)
    steps = Counter(event["step"] for event in found if event["kind"] == "train")
    ours, theirs = weights(run / "export"), weights(quiet / "export")
    same = found == expected and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    lost = sum(1 for event in expected if event["kind"] == "train" and event["step"] not in steps)
    return Counter({"lost": lost, "twice": sum(count - 1 for count in steps.values()), "different": not same})


def _named(run: Path) -> int:
    """How often a life has found something torn."""
    said = run.with_suffix(".log").read_text(errors="replace")
    return said.count("is unusable") + said.count("expected the number")


def bench(job: Job, kills: int, seconds: float, dice: random.Random) -> dict[str, object]:
    """Kill so often, or for so long; what came of it."""
    job.record()
    quiet = job.folder / "quiet"
    pace, whole_s = undisturbed(job, quiet)
    reports, differences, named, start = list[Report](), Counter[str](), 0, time.monotonic()
    while (left := kills - sum(report.kills for report in reports)) > 0 and time.monotonic() < start + seconds:
        run = job.folder / f"chaos-{len(reports)}"
        reports.append(disturbed(job, run, left, start + seconds, pace, dice))
        differences += compared(run, quiet)
        named += _named(run)
    return {
        "undisturbed_seconds": round(whole_s, 1),
        "seconds": round(time.monotonic() - start, 1),
        "runs": len(reports),
        "kills": sum(report.kills for report in reports),
        "lives_that_advanced": sum(report.advanced for report in reports),
        "named": named,
        "failed": sum(not report.finished for report in reports),
        "slowest_end_seconds": round(pace.slowest_end_s, 2),
        "victims": sum((report.victims for report in reports), Counter()),
        "interrupted": sum((report.interrupted for report in reports), Counter()),
        "torn_files": sum((report.torn for report in reports), Counter()),
        "lost": differences["lost"],
        "twice": differences["twice"],
        "bit_equal": not differences["different"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--minutes", type=float, default=24 * 60, help="no more kills after so long")
    parser.add_argument("--rollouts", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--cluster", choices=("own", "lasting"), default="own")
    parser.add_argument("--engines", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)  # forked lives cannot use the parent's thread pool
    cluster = ray_cluster() if options.cluster == "lasting" else nullcontext()
    with cluster as lasting, tempfile.TemporaryDirectory() as folder:
        job = Job(Path(folder), options.rollouts, options.ranks, options.engines, lasting)
        found = bench(job, options.kills, 60 * options.minutes, random.Random(options.seed))
    print(json.dumps({"bench": "chaos", **vars(options), **found}))
    sys.exit(not found["bit_equal"] or bool(found["failed"]))


if __name__ == "__main__":
    main()
