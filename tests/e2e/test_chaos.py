"""A run that is killed and torn at random moments ends as one that was left alone: the short form of the bench."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.e2e

BENCH = Path(__file__).resolve().parents[2] / "tools" / "bench" / "chaos.py"
DEADLINE_S = 280


def test_kills_and_torn_checkpoints_change_nothing() -> None:
    command = [sys.executable, str(BENCH), "--kills", "6", "--rollouts", "14"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert (found["lost"], found["twice"], found["bit_equal"]) == (0, 0, True)
