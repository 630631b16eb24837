"""``python -m miles.rollout.engines.sglang.install DIRECTORY``: an environment in which SGLang runs on a CPU.

SGLang on a laptop is for tests and small experiments.  On a machine with accelerators install it as its own
documentation says.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import platform
import subprocess
import sys
import venv
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from miles.core.errors import MilesError

TORCH = "torch==2.13.0"
WITHOUT_DEPENDENCIES = ("sglang==0.5.23", "xgrammar==0.2.7", "torchvision==0.28.0", "compressed-tensors==0.18.0")
REQUIREMENTS = Path(__file__).with_name("requirements.txt")
_DEADLINE_S = 1800.0
_MARK = "miles-sglang.txt"


class InstallError(MilesError):
    """pip did not succeed."""


def install(directory: Path, say: Callable[[str], None]) -> Path:
    """Make the environment unless it is there already; return its interpreter.  One process at a time."""
    directory = directory.expanduser().absolute()
    python, mark = directory / "bin" / "python", directory / _MARK
    with _alone(directory):
        if mark.is_file() and mark.read_text(encoding="utf-8") == fingerprint():
            return python
        say(f"making an environment for SGLang in {directory}: 2.7 GB, some minutes")
        mark.unlink(missing_ok=True)
        venv.create(directory, with_pip=True, clear=True)
        _check_torch(python)
        _pip(python, TORCH)
        _pip(python, "--no-deps", *WITHOUT_DEPENDENCIES)
        _pip(python, TORCH, "--requirement", str(REQUIREMENTS))
        mark.write_text(fingerprint(), encoding="utf-8")
    return python


def fingerprint() -> str:
    """Of what is installed: an environment that has another one is made again."""
    wanted = [sys.version, TORCH, *WITHOUT_DEPENDENCIES, REQUIREMENTS.read_text(encoding="utf-8")]
    return hashlib.sha256("\n".join(wanted).encode()).hexdigest()


@contextmanager
def _alone(directory: Path) -> Iterator[None]:
    directory.parent.mkdir(parents=True, exist_ok=True)
    with (directory.parent / f"{directory.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _check_torch(python: Path) -> None:
    """InstallError where pip would take a torch that is built for CUDA, gigabytes that a CPU cannot use."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return
    report = json.loads(_pip(python, TORCH, "--no-deps", "--dry-run", "--report", "-"))
    chosen = report["install"][0]["metadata"]["version"]
    if not chosen.endswith("+cpu"):
        raise InstallError(
            f"pip would install torch {chosen}, which is built for CUDA and brings gigabytes of libraries. Set "
            "PIP_INDEX_URL or PIP_EXTRA_INDEX_URL to an index that has PyTorch's builds for CPUs, and try again"
        )


def _pip(python: Path, *arguments: str) -> str:
    """Output of ``pip install``."""
    command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_DEADLINE_S, check=False)
    if done.returncode != 0:
        raise InstallError(f"{' '.join(command)} ended with status {done.returncode}:\n{done.stderr[-4000:]}")
    return done.stdout


def main(argv: list[str]) -> int:
    """Make the environment; say how to use it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("directory", type=Path)
    flags = parser.parse_args(argv)
    try:
        python = install(flags.directory, lambda text: print(text, flush=True))  # noqa: T201
    except InstallError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    print(f"ready: --rollout-engine sglang --sglang-python {python}")  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
