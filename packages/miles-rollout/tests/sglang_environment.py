"""The environment with SGLang for tests: the one of ``MILES_SGLANG_PYTHON``, or one in ``build/sglang``, made once."""

from __future__ import annotations

import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from miles.core import environ

DIRECTORY = Path(__file__).resolve().parents[3] / "build" / "sglang"
FIXTURE = "sglang_python"
_DEADLINE_S = 900.0
_OFFLINE = ("No matching distribution found", "Connection", "Name or service not known", "Max retries exceeded")


@cache
def _making() -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "miles.rollout.engines.sglang.install", str(DIRECTORY)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def start_if_wanted(items: list[pytest.Item]) -> None:
    """Begin to make the environment while other tests run."""
    wanted = any(FIXTURE in getattr(item, "fixturenames", ()) for item in items)
    if wanted and environ.sglang_python() is None:
        _making()


def stop() -> None:
    """End what nobody waits for any more."""
    if _making.cache_info().currsize and _making().poll() is None:
        _making().terminate()
        _making().wait(10)


def python_with_sglang() -> str:
    """Its interpreter; skips the test where packages cannot be had."""
    given = environ.sglang_python()
    if given is not None:
        return given
    output, _ = _making().communicate(timeout=_DEADLINE_S)
    if _making().returncode != 0:
        if any(sign in output for sign in _OFFLINE):
            pytest.skip(f"SGLang cannot be installed here, pip reaches no package index: {output[-300:]}")
        pytest.fail(f"the environment with SGLang could not be made:\n{output}")
    return str(DIRECTORY / "bin" / "python")
