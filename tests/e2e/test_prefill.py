"""Prefill and decode by different SGLang servers: what the decode server answers is what the trainer computes."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from sglang_environment import python_with_sglang
from test_main_job import events

from miles.core import environ

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

TRANSFER = ("nixl==1.5.1", "nixl-cu12==1.5.1")
"""Moves keys and values from memory to memory of any kind."""
DEADLINE_S = 300


@pytest.fixture(scope="module")
def sglang_python() -> str:
    """An environment that has NIXL as well; one that is not the tests' own is left as it is."""
    python = python_with_sglang()
    if subprocess.run([python, "-c", "import nixl._api"], capture_output=True, timeout=DEADLINE_S).returncode:
        install = [python, "-m", "pip", "install", "--quiet", "--no-deps", *TRANSFER]
        if environ.sglang_python() or subprocess.run(install, capture_output=True, timeout=DEADLINE_S).returncode:
            pytest.skip(f"{python} has no NIXL: {' '.join(install[1:])}")
    return python


def test_a_run_with_a_prefill_server_that_is_killed(toy, miles, sglang_python, tmp_path):
    run = tmp_path / "run"
    servers = ["--rollout-num-engines", "2", "--prefill-num-servers", "1", "--use-fault-tolerance"]
    # Only its end tells that an engine is lost: on a busy machine a living one may be late with a heartbeat.
    servers += ["--rollout-health-check-first-wait", "900"]
    lethal = ["--custom-generate-function-path", "lethal_generate.generate_after_harm"]
    sglang = ["--rollout-engine", "sglang", "--sglang-python", sglang_python, "--sglang-max-total-tokens", "16k"]
    done = miles(
        "train",
        *toy.flags(run, *servers, *lethal, *sglang, "--num-rollout", "2", "--save-interval", "2"),
        PYTHONPATH=str(Path(__file__).parent),
        LETHAL_SIGNAL="SIGKILL",
        LETHAL_SAMPLE="16",
    )
    assert "engine 0 has ended with status -9 (SIGKILL)" in done.stdout + done.stderr
    assert sum(event["metrics"]["rollout/engine_restarts"] for event in events(run, "rollout")) == 1
    for rollout_id in range(2):
        rows = map(json.loads, (run / "rollouts" / f"rollout_{rollout_id:07d}.jsonl").open())
        assert sorted(row["index"] for row in rows) == list(range(16 * rollout_id, 16 * rollout_id + 16))
    assert all(step["metrics"]["train/train_rollout_logprob_abs_diff"] < 1e-4 for step in events(run, "train")[::2])
