"""Light modules stay light: imported in a fresh interpreter, they bring nothing heavy along."""

from __future__ import annotations

import resource
import subprocess
import sys

import pytest

HEAVY = ("torch", "transformers", "ray", "sglang", "megatron", "pyarrow", "sympy", "wandb", "tensorboard")

LIGHT = (
    "miles.core.cli",
    "miles.core.config",
    "miles.core.config.checks",
    "miles.core.config.derive",
    "miles.core.contract",
    "miles.core.flags",
    "miles.core.hardware",
    "miles.core.plugins",
    "miles.core.protocols.backend",
    "miles.core.protocols.engine",
    "miles.core.protocols.reward",
    "miles.core.protocols.rollout",
    "miles.core.protocols.tracker",
    "miles.core.registry",
    "miles.core.run_directory",
    "miles.core.types",
    "miles.fsdp.backend",
    "miles.fsdp.flags",
    "miles.fsdp.rules",
    "miles.megatron.backend",
    "miles.megatron.flags",
    "miles.rewards",
    "miles.rewards.dispatch",
    "miles.rewards.flags",
    "miles.rollout.derive",
    "miles.rollout.flags",
    "miles.rollout.rules",
    "miles.router",
    "miles.router.flags",
    "miles.router.server",
)


def heavy_after(code: str) -> list[str]:
    """Heavy modules in ``sys.modules`` of a fresh interpreter that ran ``code``."""
    probe = f"import sys\n{code}\nprint('LOADED', *[name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("LOADED")]
    return line.split()[1:]


@pytest.mark.parametrize("module", LIGHT)
def test_importing_it_brings_nothing_heavy(module):
    assert heavy_after(f"import {module}") == []


def test_a_configuration_is_resolved_and_checked_without_anything_heavy():
    code = "from miles.core.config import Config; Config.examine(['--rollout-batch-size', '8', '--rm-type', 'math'])"
    assert heavy_after(code) == []


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["plugins"], ["config", "--unsupported"]])
def test_the_command_answers_without_anything_heavy(arguments):
    assert heavy_after(f"from miles.core.cli import main; main({arguments!r})") == []


def test_help_is_fast():
    """Counted in processor time, which does not depend on what else the machine does."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    code = "from miles.core.cli import main; main(['--help'])"
    subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0
