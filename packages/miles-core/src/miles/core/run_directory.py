"""Where everything about a run lies.

RUN/config.json                             what the run was told, and where each value came from
RUN/metrics.jsonl                           one line per logged event
RUN/rollouts/rollout_0000003.jsonl          the samples of a rollout, one per line
RUN/rollouts/eval_0000003_gsm8k.jsonl       the samples of an evaluation
RUN/logs/engine-0.log                       output of the processes of the run
RUN/iter_0000003/                           a checkpoint (``miles.core.driver.checkpoint``)
RUN/report.html                             the page that shows all of it
RUN/lock                                    held while a process works on the run, which it names
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from miles.core.durable import replace_text
from miles.core.errors import ConfigError

_ROLLOUT = re.compile(r"rollout_(\d+)\.jsonl")
_EVALUATION = re.compile(r"eval_(\d+)_(.+)\.jsonl")


@dataclass(frozen=True, slots=True)
class RunDirectory:
    """Names of the files of a run.  Constructing it touches nothing."""

    path: Path

    @classmethod
    def choose(cls, save: str | Path | None, name: str) -> RunDirectory:
        """``--save`` where it is given, else a fresh ``runs/<time>-<name>``, made so that no other run gets it."""
        if save is not None:
            return cls(Path(save))
        slug = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-") or "run"
        stem = f"{time.strftime('%Y%m%d-%H%M%S')}-{slug}"
        for number in count(1):
            path = Path("runs") / (stem if number == 1 else f"{stem}-{number}")
            with suppress(FileExistsError):
                path.mkdir(parents=True)
                return cls(path)
        raise AssertionError("counting has no end")

    @property
    def config(self) -> Path:
        return self.path / "config.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def rollouts(self) -> Path:
        return self.path / "rollouts"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    def log_file(self, process: str) -> Path:
        """Output of ``process``, for example ``engine-0``."""
        return self.logs / f"{process}.log"

    def rollout_samples(self, rollout_id: int) -> Path:
        """Samples that were trained on."""
        return self.rollouts / f"rollout_{rollout_id:07d}.jsonl"

    def eval_samples(self, rollout_id: int, dataset: str) -> Path:
        """Samples of one evaluation data set.  ``rollout_id`` counts the rollouts trained on before it."""
        return self.rollouts / f"eval_{rollout_id:07d}_{dataset}.jsonl"

    def create(self) -> RunDirectory:
        """Make the folders; what is there stays.  ConfigError when nothing can be written there."""
        try:
            for folder in (self.path, self.rollouts, self.logs):
                folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"--save {self.path}: no run can be kept there: {error}. Name another directory"
            ) from None
        return self

    def write_config(self, values: Mapping[str, Any], origins: Mapping[str, str]) -> None:
        """Write ``config.json``: the value of every flag (``Config.record``) and its origin (``Config.origin``)."""
        entries = {name: {"value": value, "origin": origins.get(name, "default")} for name, value in values.items()}
        replace_text(self.config, json.dumps(entries, indent=1, default=str) + "\n")

    def read_config(self) -> dict[str, Any]:
        """The value of every flag, as ``write_config`` took them; empty before the run has written them.

        ConfigError when the file was torn or changed.
        """
        if not self.config.is_file():
            return {}
        try:
            entries: dict[str, dict[str, Any]] = json.loads(self.config.read_text())
        except ValueError as error:
            raise ConfigError(
                f"{self.config} cannot be read: {error}. Remove it: the next start of the run writes it anew"
            ) from None
        return {name: entry["value"] for name, entry in entries.items()}

    def rollout_files(self) -> Iterator[tuple[int, Path]]:
        """``(rollout_id, file)`` of every rollout whose samples were written, in order."""
        for path in sorted(self.rollouts.glob("rollout_*.jsonl")):
            if match := _ROLLOUT.fullmatch(path.name):
                yield int(match[1]), path

    def eval_files(self) -> Iterator[tuple[int, str, Path]]:
        """``(rollout_id, data set, file)`` of every evaluation, in order."""
        for path in sorted(self.rollouts.glob("eval_*.jsonl")):
            if match := _EVALUATION.fullmatch(path.name):
                yield int(match[1]), match[2], path
