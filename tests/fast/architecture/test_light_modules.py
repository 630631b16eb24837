"""Light modules stay light: imported in a fresh interpreter, they bring nothing heavy along."""

from __future__ import annotations

import resource
import subprocess
import sys

HEAVY = ("torch", "transformers", "ray", "sglang", "megatron", "pyarrow", "sympy", "wandb", "tensorboard")

LIGHT = (
    "miles.core.cli",
    "miles.core.config",
    "miles.core.contract",
    "miles.core.flags",
    "miles.core.hardware",
    "miles.core.plugins",
    "miles.core.protocols",
    "miles.core.registry",
    "miles.core.report",
    "miles.core.run_directory",
    "miles.core.types",
    "miles.fsdp.backend",
    "miles.fsdp.flags",
    "miles.fsdp.rules",
    "miles.megatron.backend",
    "miles.megatron.flags",
    "miles.rewards",
    "miles.rollout.derive",
    "miles.rollout.flags",
    "miles.rollout.rules",
    "miles.router",
)
"""Modules, and packages with everything in them."""

PROBE = """
import sys
for name, code in {steps!r}:
    exec(code)
    print("LOADED", name, *[heavy for heavy in {heavy!r} if heavy in sys.modules], sep="\\t")
"""


def heavy_after(steps: dict[str, str]) -> dict[str, list[str]]:
    """Heavy modules in ``sys.modules`` of a fresh interpreter after each of ``steps`` (code by name), in order.

    One interpreter for all: what the last one does not find, none brought along.
    """
    probe = PROBE.format(steps=list(steps.items()), heavy=HEAVY)
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    rows = [line.split("\t")[1:] for line in done.stdout.splitlines() if line.startswith("LOADED")]
    found = {name: heavy for name, *heavy in rows}
    assert list(found) == list(steps)
    return found


def test_importing_light_modules_brings_nothing_heavy(sources):
    inside = tuple(f"{name}." for name in LIGHT)
    light = [source.module for source in sources if source.module in LIGHT or source.module.startswith(inside)]
    assert len(light) > 150
    found = heavy_after({module: f"import {module}" for module in light if not module.endswith(".__main__")})
    assert {module: heavy for module, heavy in found.items() if heavy} == {}


def test_a_configuration_is_resolved_and_checked_without_anything_heavy():
    arguments = ["--rollout-batch-size", "8", "--rm-type", "math"]
    code = f"from miles.core.config import Config; Config.examine({arguments!r})"
    assert heavy_after({"examine": code}) == {"examine": []}


def test_the_command_answers_without_anything_heavy():
    commands = (["--help"], ["train", "--help"], ["plugins"], ["config", "--unsupported"])
    found = heavy_after({" ".join(each): f"from miles.core.cli import main; main({each!r})" for each in commands})
    assert {command: heavy for command, heavy in found.items() if heavy} == {}


def test_help_is_fast():
    """Counted in processor time, which does not depend on what else the machine does."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    code = "from miles.core.cli import main; main(['--help'])"
    subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0
