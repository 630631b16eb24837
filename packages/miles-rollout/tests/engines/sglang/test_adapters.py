"""The policy's adapter in SGLang's server: what it is started with, and what it then computes."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import aiohttp
import pytest
import torch
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "embedded"))

from engine_client import PROMPT, Client
from engine_models import save_model
from rollout_fakes import CHATML, save_tokenizer
from sglang_environment import python_with_sglang

from miles.core.config import Config
from miles.core.errors import EngineError
from miles.core.ports import free_ports
from miles.core.protocols.engine import EngineSpec
from miles.core.weights.adapter_form import AdapterForm
from miles.core.weights.adapter_serving import obstacle
from miles.core.weights.engine_client import EngineFleet
from miles.core.weights.shm import SharedMemoryTransport
from miles.core.weights.sync import push_weights
from miles.rollout.engines.sglang.adapters import adapter_options
from miles.rollout.engines.sglang.launcher import SGLangEngine
from miles.rollout.rules import check_adapter_serving

FLAGS = {"rollout_engine": "sglang", "lora_rank": 3, "rollout_num_engines": 1, "device": "cpu"}
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return save_tokenizer(save_model("qwen3-tied", tmp_path_factory.mktemp("dense")), CHATML)


def options(path, **flags):
    return adapter_options(Config.of(hf_checkpoint=str(path), **FLAGS | flags))


def test_servers_are_started_for_the_adapters_that_are_trained(dense):
    found = options(dense)
    assert (found["enable_lora"], found["max_lora_rank"], found["lora_backend"]) == (True, 3, "torch_native")
    assert found["lora_target_modules"] == ALL
    some = options(dense, target_modules=["layers.1.self_attn.q_proj", "down_proj"])
    assert some["lora_target_modules"] == ["q_proj", "down_proj"]


@pytest.mark.parametrize(
    "flags",
    [
        {"lora_rank": 0},
        {"lora_serving": "merged"},
        {"rollout_engine": "embedded"},
        {"check_weight_update_equal": True},
        {"offload_rollout": True},
        {"target_modules": ["lm_head"]},
    ],
)
def test_servers_of_whole_weights_are_started_as_ever(dense, flags):
    assert options(dense, **flags) == {}


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        ({"lora_rank": 0}, "needs --lora-rank"),
        ({"offload_rollout": True}, "--rollout-engine sglang: --offload-rollout: servers give up the memory"),
        ({"check_weight_update_equal": True}, "--check-weight-update-equal: .* with noise. Leave one"),
        ({"prefill_num_servers": 1}, "--prefill-num-servers: adapters were not tried"),
        ({"update_weight_transport": "disk"}, "--update-weight-transport disk: adapters come through shared memory"),
        ({}, None),
        ({"offload_rollout": True, "rollout_engine": "embedded"}, None),
    ],
)
def test_flags_that_keep_engines_from_adapters_are_told_before_the_run(flags, problem):
    found = list(check_adapter_serving(Config.of(**FLAGS | {"lora_serving": "adapter"} | flags)))
    assert len(found) == (problem is not None)
    assert problem is None or re.search(problem, found[0])


def test_experts_get_no_adapters(model_path_of_experts):
    assert options(model_path_of_experts)["lora_target_modules"] == ALL[:4]


@pytest.fixture(scope="module")
def model_path_of_experts(tmp_path_factory):
    return save_model("qwen3-moe", tmp_path_factory.mktemp("experts"))


@pytest.fixture(scope="module")
def server(dense):
    (port,) = free_ports(1)
    given = options(dense) | {"python": python_with_sglang(), "max_total_tokens": 4096}
    spec = EngineSpec(str(dense), "127.0.0.1", port, log_path=dense / "sglang.log", options=given)
    engine = SGLangEngine().launch(spec)
    try:
        engine.wait_ready(240)
        yield engine.url
    finally:
        engine.stop()


@pytest.fixture
def fleet(server):
    fleet = EngineFleet([server], deadline_s=60)
    yield fleet
    fleet.close()


@pytest.fixture
def transport(tmp_path):
    transport = SharedMemoryTransport(tmp_path)
    yield transport
    transport.close()


def adapter_of(model, layers, seed):
    """An adapter's form and tensors, and ``model`` with it added."""
    generator = torch.Generator().manual_seed(seed)
    linear = {name: each for name, each in model.named_modules() if name.rpartition(".")[2] in layers}
    form, tensors = AdapterForm(3, 6.0, tuple(linear)), {}
    with torch.no_grad():
        for name, layer in linear.items():
            outputs, inputs = layer.weight.shape
            a = tensors[f"{name}.lora_A.weight"] = torch.randn(3, inputs, generator=generator) * 0.1
            b = tensors[f"{name}.lora_B.weight"] = torch.randn(outputs, 3, generator=generator) * 0.1
            layer.weight += form.scale * (b @ a)
    return form, tensors


async def assert_serves(client, model, version, **asked):
    params = {"max_new_tokens": 12, "sampling_seed": 3, "ignore_eos": True}
    answers = await client.generate(sampling_params=params | asked, return_logprob=True)
    for answer in answers if isinstance(answers, list) else [answers]:
        with torch.no_grad():
            tokens = torch.tensor([PROMPT + answer["output_ids"]])
            expected = model(tokens).logits[0, len(PROMPT) - 1 : -1].float().log_softmax(-1)
        found = [entry[0] for entry in answer["meta_info"]["output_token_logprobs"]]
        wanted = [row[token].item() for row, token in zip(expected, answer["output_ids"], strict=True)]
        assert found == pytest.approx(wanted, abs=5e-5)
        assert answer["meta_info"]["weight_version"] == version


@pytest.mark.e2e
@pytest.mark.timeout(900)
async def test_requests_are_answered_with_the_adapter_of_the_last_update(dense, server, fleet, transport):
    base = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32).eval()
    async with aiohttp.ClientSession() as session:
        client = Client(session, server)
        await assert_serves(client, base, "default")
        for version, layers in enumerate((ALL, ["q_proj", "up_proj"])):
            model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32).eval()
            form, tensors = adapter_of(model, layers, version)
            assert obstacle(form, server, fleet.get("/server_info")[0]) is None
            report = push_weights(
                tensors.items(), fleet, transport, version=version, bucket_bytes=1 << 12, adapter=form
            )
            assert report.bytes == sum(tensor.nbytes for tensor in tensors.values())
            await assert_serves(client, model, str(version))
            await assert_serves(client, model, str(version), n=2)
        large = AdapterForm(4, 4.0, ("model.layers.0.mlp.down_proj",))
        assert "adapters of rank 3 at most, not 4" in (obstacle(large, server, fleet.get("/server_info")[0]) or "")
        tensors = {name: torch.zeros(4, 96) if "lora_A" in name else torch.zeros(48, 4) for name in large.names()}
        with pytest.raises(EngineError, match="beyond --max-lora-rank 3"):
            push_weights(tensors.items(), fleet, transport, version=9, bucket_bytes=1 << 20, adapter=large)
