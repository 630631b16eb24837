import json
import socket
import urllib.request

import pytest

from miles.core.errors import EngineError
from miles.core.protocols.engine import EngineSpec
from miles.rollout.engines.embedded.launcher import EmbeddedEngine


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def spec(path, tmp_path, **changes):
    return EngineSpec(str(path), "127.0.0.1", free_port(), log_path=tmp_path / "engine.log", **changes)


@pytest.mark.e2e
def test_an_engine_starts_serves_and_stops(model_path, tmp_path):
    options = {"max_running_requests": 3, "served_model_name": "policy"}
    engine = EmbeddedEngine().launch(spec(model_path("qwen3-tied"), tmp_path, seed=4, options=options))
    try:
        engine.wait_ready(120)
        body = json.dumps({"input_ids": [3, 4], "sampling_params": {"max_new_tokens": 5, "ignore_eos": True}}).encode()
        with urllib.request.urlopen(f"{engine.url}/generate", body) as response:
            assert len(json.load(response)["output_ids"]) == 5
        with urllib.request.urlopen(f"{engine.url}/server_info") as response:
            facts = json.load(response)
        assert (facts["max_running_requests"], facts["seed"], facts["served_model_name"]) == (3, 4, "policy")
        assert engine.alive()
    finally:
        engine.stop()
    assert not engine.alive()


@pytest.mark.e2e
def test_a_directory_that_is_no_model_is_named(tmp_path):
    engine = EmbeddedEngine().launch(spec(tmp_path / "nothing", tmp_path))
    with pytest.raises(
        EngineError, match=r"engine 0 has ended with status 1 while starting[\s\S]*there is no config\.json"
    ):
        engine.wait_ready(120)


def test_options_that_do_not_apply_are_reported():
    problems = EmbeddedEngine().check({"mem_fraction_static": 0.8, "context_length": 100})
    assert len(problems) == 1
    assert problems[0].startswith("--sglang-mem-fraction-static does not apply to the embedded engine")
