"""The recipes, shortened: every step of the path as a user walks it."""

import subprocess
import sys
from pathlib import Path

import pytest

from miles.core.report import evaluations
from miles.core.run_directory import RunDirectory

RECIPES = Path(__file__).parents[2] / "tools" / "recipes"

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]


def run(name, *options):
    """Output of a recipe that must succeed."""
    command = [sys.executable, str(RECIPES / name), *map(str, options)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_quick_start_goes_from_nothing_to_a_page_and_continues(tmp_path):
    options = ("--output", tmp_path, "--sft-steps", 3)
    first = run("quickstart.py", *options, "--steps", 2)
    practice = RunDirectory(tmp_path / "grpo")
    assert "Held-out sums answered right:" in first
    assert str(practice.report) in first
    assert [one.rollout_id for one in evaluations(practice)] == [0, 2]
    assert practice.report.stat().st_size > 50_000
    assert (tmp_path / "taught" / "model.safetensors").is_file()

    longer = run("quickstart.py", *options, "--steps", 3)
    assert f"Already done: {tmp_path / 'sft'}" in longer
    assert [rollout_id for rollout_id, _ in practice.rollout_files()] == [0, 1, 2]


def test_gsm8k_runs_on_real_text(tmp_path):
    output = run("gsm8k.py", "--output", tmp_path, "--sft-steps", 2, "--steps", 2, "--num-eval", 4)
    assert "report.html" in output
    found = evaluations(RunDirectory(tmp_path / "grpo"))
    assert {(one.dataset, one.num_samples) for one in found} == {("gsm8k", 4)}
