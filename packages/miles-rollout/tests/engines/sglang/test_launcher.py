from __future__ import annotations

import json
import os
import signal
import subprocess
import time
import urllib.request
from pathlib import Path

import pytest
from engine_models import save_model
from sglang_environment import python_with_sglang

from miles.core.ports import free_ports
from miles.core.protocols.engine import EngineSpec
from miles.rollout.engines.sglang import server_files
from miles.rollout.engines.sglang.launcher import SGLangEngine, server_options, server_variables


def spec(path, **changes):
    return EngineSpec(str(path), "127.0.0.1", changes.pop("port", 1), **changes)


def written(directory: Path, dtype: str | None) -> Path:
    (directory / "config.json").write_text(json.dumps({} if dtype is None else {"dtype": dtype}))
    return directory


@pytest.mark.parametrize(("stored", "served"), [("float32", "float32"), ("bfloat16", "bfloat16"), (None, "float32")])
def test_a_cpu_serves_in_the_checkpoints_own_precision(tmp_path, stored, served):
    assert server_options(spec(written(tmp_path, stored)))["dtype"] == served
    assert server_options(spec(tmp_path, dtype="bfloat16"))["dtype"] == "bfloat16"
    assert server_options(spec(tmp_path, num_gpus=1))["dtype"] == "auto"


def test_the_users_word_is_over_the_defaults(tmp_path):
    written(tmp_path, None)
    assert server_options(spec(tmp_path))["max_total_tokens"] == 65536
    given = {"max_total_tokens": 99, "mem_fraction_static": 0.5, "python": "/somewhere"}
    options = server_options(spec(tmp_path, options=given, context_length=128, seed=3))
    assert (options["max_total_tokens"], options["mem_fraction_static"]) == (99, 0.5)
    assert (options["context_length"], options["random_seed"]) == (128, 3)
    assert "python" not in options


def test_on_accelerators_the_server_is_its_own(tmp_path):
    options = server_options(spec(tmp_path, num_gpus=4, first_gpu=2))
    assert (options["tp_size"], options["base_gpu_id"], options["mem_fraction_static"]) == (4, 2, 0.9)
    assert not {"device", "attention_backend", "max_total_tokens"} & {k for k, v in options.items() if v is not None}


def test_prefill_and_decode_servers_are_told_what_they_are(tmp_path):
    prefill = server_options(spec(tmp_path, num_gpus=1, part="prefill", bootstrap_port=7))
    assert (prefill["disaggregation_mode"], prefill["disaggregation_bootstrap_port"]) == ("prefill", 7)
    assert "disaggregation_transfer_backend" not in prefill
    written(tmp_path, None)
    assert server_options(spec(tmp_path, part="decode"))["disaggregation_transfer_backend"] == "nixl"
    assert "disaggregation_mode" not in server_options(spec(tmp_path))


def test_an_engine_of_several_nodes_knows_where_they_meet(tmp_path):
    options = server_options(spec(tmp_path, num_gpus=16, num_nodes=2, node_rank=1, rendezvous="a:1"))
    assert (options["tp_size"], options["nnodes"], options["node_rank"]) == (16, 2, 1)
    assert options["dist_init_addr"] == "a:1"


def test_a_server_that_must_be_idle_at_times_generates_for_nobody_who_asks_for_its_health(tmp_path):
    name = "SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION"
    assert server_variables(spec(tmp_path, releases_memory=True))[name] == "false"
    assert server_variables(spec(tmp_path, part="decode"))[name] == "false"
    assert name not in server_variables(spec(tmp_path))


def test_a_server_that_takes_changes_knows_how_they_are_written(tmp_path):
    given = server_variables(spec(tmp_path, takes_changes=True))["MILES_CHANGE_CODE"]
    assert "def apply(" in Path(given).read_text(encoding="utf-8")
    assert "MILES_CHANGE_CODE" not in server_variables(spec(tmp_path))


def test_directories_of_servers_whose_owner_is_gone_are_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(server_files, "SHARED_MEMORY", tmp_path)
    with subprocess.Popen(["true"]) as ended:
        pass
    lost, foreign = tmp_path / f"miles-sglang-{ended.pid}-x", tmp_path / "miles-sglang-x"
    for directory in (lost, foreign):
        directory.mkdir()
    (lost / "load").write_text("")
    mine = server_files.make_directory()
    assert server_files.make_directory() != mine
    assert (lost.exists(), foreign.exists(), mine.is_dir()) == (False, True, True)


def descendants(pid: int) -> set[int]:
    """Process ids below ``pid``."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    found = {pid}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return found - {pid}


@pytest.mark.e2e
@pytest.mark.timeout(900)
def test_a_server_starts_and_dies_whole(tmp_path):
    (port,) = free_ports(1)
    options = {"python": python_with_sglang(), "max_running_requests": 5}
    path = save_model("qwen3-tied", tmp_path / "model")
    log = tmp_path / "engine.log"
    options["skip_tokenizer_init"] = True
    engine = SGLangEngine().launch(spec(path, port=port, seed=4, index=3, options=options, log_path=log))
    try:
        engine.wait_ready(240)
        with urllib.request.urlopen(f"{engine.url}/server_info") as response:
            facts = json.load(response)
        assert (facts["max_running_requests"], facts["random_seed"], facts["dtype"]) == (5, 4, "float32")
        assert engine.alive()
        assert (engine.files / "load").is_file()
        assert any(path.is_socket() for path in engine.files.iterdir())
        children = descendants(engine.process.pid)
        assert children
        os.kill(engine.process.pid, signal.SIGKILL)
        deadline = time.monotonic() + 30
        while any(Path(f"/proc/{child}").exists() for child in children) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not [child for child in children if Path(f"/proc/{child}").exists()]
        assert not engine.alive()
        assert "engine 3" in engine.describe_end()
    finally:
        engine.stop()
    assert not engine.files.exists()
