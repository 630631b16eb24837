"""Which engines are sent an adapter, and what they are told of it."""

import pytest
import torch

from miles.core.config import Config
from miles.core.errors import ConfigError
from miles.core.flags.training import Training
from miles.core.weights.adapter_form import AdapterForm
from miles.core.weights.adapter_serving import served_form
from miles.core.weights.sender import WeightSender

Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"
FORM = AdapterForm(4, 8.0, (Q, DOWN))
EMBEDDED = {"engine": "miles-embedded", "adapters": {"layers": [Q, DOWN]}}
SGLANG = {
    "enable_lora": True,
    "custom_weight_loader": ["miles_shm"],
    "max_lora_rank": 4,
    "lora_target_modules": ["q_proj", "k_proj", "down_proj"],
}
HERE = "http://127.0.0.1:3000"


def served(*facts, url=HERE, **flags):
    config = Config.of(**{"lora_rank": 4, "rollout_external": False, **flags})
    return served_form(config, FORM, {f"{url}{number}": fact for number, fact in enumerate(facts)})


def test_tensors_have_the_names_of_peft_without_its_prefix():
    assert FORM.names() == [f"{layer}.{part}.weight" for layer in (Q, DOWN) for part in ("lora_A", "lora_B")]
    assert FORM.scale == 2.0


def test_the_form_survives_json():
    assert AdapterForm.of_json(FORM.to_json()) == FORM
    with pytest.raises(ValueError, match="rank 0 is below 1"):
        AdapterForm.of_json(FORM.to_json() | {"rank": 0})


@pytest.mark.parametrize("facts", [EMBEDDED, SGLANG])
@pytest.mark.parametrize("serving", ["auto", "adapter"])
def test_engines_that_can_add_the_adapter_themselves(facts, serving):
    assert served(facts, facts, lora_serving=serving) == FORM


def test_whole_weights_where_they_are_asked_for():
    assert served(EMBEDDED, lora_serving="merged") is None


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        ({"engine": "miles-embedded"}, "takes whole weights only"),
        ({"adapters": {"layers": [Q]}}, f"adds no adapter to {DOWN}$"),
        ({"adapters": {"layers": []}}, f"adds no adapter to {Q} and 1 more layers"),
        (SGLANG | {"max_lora_rank": 2}, "was started for adapters of rank 2 at most, not 4"),
        (SGLANG | {"lora_target_modules": ["down_proj"]}, f"adds no adapter to {Q}$"),
        (SGLANG | {"custom_weight_loader": None}, "takes whole weights only"),
        (SGLANG | {"enable_lora": False}, "takes whole weights only"),
    ],
)
def test_one_engine_that_cannot_decides_for_all(facts, reason, caplog):
    with caplog.at_level("INFO"):
        assert served(EMBEDDED, facts) is None
    assert "whole weights with the adapter added" in caplog.text
    with pytest.raises(ConfigError, match=f"--lora-serving adapter: the engine at {HERE}1 .*{reason.rstrip('$')}"):
        served(EMBEDDED, facts, lora_serving="adapter")


@pytest.mark.parametrize("where", [{"url": "http://10.0.0.1:3000"}, {"update_weight_transport": "broadcast"}])
def test_sglang_takes_adapters_through_shared_memory_only(where):
    assert served(SGLANG, **where) is None
    assert served(EMBEDDED, **where) == FORM


def test_engines_of_somebody_else_get_adapters_where_that_is_asked_for():
    assert served(EMBEDDED, rollout_external=True) is None
    assert served(EMBEDDED, rollout_external=True, lora_serving="adapter") == FORM


def test_engines_are_told_of_the_adapter_before_its_tensors(engines, tmp_path):
    flags = Training(update_weight_transport="shm", train_backend="fsdp")
    sender = WeightSender(flags, tmp_path, deadline_s=10, remembers=True)
    tensors = {name: torch.randn(3) for name in FORM.names()}
    report = sender.send(tensors.items(), [engines[0].url], 1, FORM)
    sender.send_again([engines[1].url], 1)
    sender.close()
    assert report.bytes == 4 * 3 * 4
    for engine in engines:
        assert engine.payloads["/begin_weight_update"] == {"selector": "all", "adapter": FORM.to_json()}
        assert engine.payloads["/update_weights_from_tensor"]["bucket"]["adapter"] == FORM.to_json()
        assert engine.weights.keys() == set(FORM.names())
