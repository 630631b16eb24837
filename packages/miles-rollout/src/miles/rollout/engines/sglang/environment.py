"""The interpreter that has SGLang, and what its server can be told."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from miles.core import environ
from miles.core.errors import ConfigError

SERVER_PACKAGES = Path(__file__).with_name("server")
"""Where ``miles_sglang`` is imported from in SGLang's environment."""
_VERSION = "import importlib.metadata as m; print(m.version('sglang'))"
_VERSION_DEADLINE_S = 60.0
_ARGUMENTS_DEADLINE_S = 300.0
INSTALL = "python -m miles.rollout.engines.sglang.install DIRECTORY"


@dataclass(frozen=True, slots=True)
class Argument:
    """One argument of the server."""

    flags: tuple[str, ...]
    """Its spellings; the first one is the name that it goes by."""
    type: str
    """``int``, ``float``, ``str``, ``loads`` (JSON), ``human_readable_int`` (32k), or a function of SGLang's own."""
    choices: tuple[str, ...] | None
    several: bool
    """Takes a list."""
    switch: bool
    """Takes no value."""


@dataclass(frozen=True, slots=True)
class Environment:
    """A Python interpreter."""

    python: Path

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Environment:
        """The one of ``--sglang-python``, of ``MILES_SGLANG_PYTHON``, or the one that runs."""
        return cls(Path(str(options.get("python") or environ.sglang_python() or sys.executable)).expanduser())

    def problem(self) -> str | None:
        """Why it cannot start SGLang; None if it can."""
        chosen = "" if str(self.python) == sys.executable else f"--sglang-python {self.python}: "
        if not self.python.is_file():
            return f"{chosen}there is no such interpreter. Expected the python of an environment with SGLang"
        if self.version() is None:
            return (
                f"{chosen}SGLang is not installed in the environment of {self.python}. Give the interpreter of one "
                f"that has it as --sglang-python, make one for a CPU with `{INSTALL}`, or choose another "
                "--rollout-engine"
            )
        return None

    def version(self) -> str | None:
        """Of the installed SGLang."""
        return _version(str(self.python))

    def arguments(self) -> tuple[Argument, ...]:
        """Of the installed server.  It takes seconds to ask, so the answer is kept in the cache directory."""
        program = SERVER_PACKAGES / "miles_sglang" / "arguments.py"
        key = f"{self.python}\n{self.version()}\n{program.read_text(encoding='utf-8')}"
        kept = environ.cache_dir() / f"sglang-arguments-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
        if not kept.is_file():
            text = self._ask()
            kept.parent.mkdir(parents=True, exist_ok=True)
            partial = kept.with_suffix(f".{hashlib.sha256(text.encode()).hexdigest()[:8]}")
            partial.write_text(text, encoding="utf-8")
            partial.replace(kept)
        table = json.loads(kept.read_text(encoding="utf-8"))["arguments"]
        return tuple(
            Argument(
                flags=tuple(row["flags"]),
                type=row["type"],
                choices=None if row["choices"] is None else tuple(row["choices"]),
                several=row["several"],
                switch=row["switch"],
            )
            for row in table
        )

    def _ask(self) -> str:
        ask = f"import sys; sys.path[:0] = [{str(SERVER_PACKAGES)!r}]; from miles_sglang.arguments import main; main()"
        command = [str(self.python), "-c", ask]
        done = subprocess.run(command, capture_output=True, text=True, timeout=_ARGUMENTS_DEADLINE_S, check=False)
        if done.returncode != 0:
            end = "\n".join(done.stderr.splitlines()[-20:])
            raise ConfigError(f"the SGLang of {self.python} cannot be imported, so it would not start:\n{end}")
        return done.stdout.splitlines()[-1]


@cache
def _version(python: str) -> str | None:
    done = subprocess.run(
        [python, "-c", _VERSION], capture_output=True, text=True, timeout=_VERSION_DEADLINE_S, check=False
    )
    return done.stdout.strip() if done.returncode == 0 else None
