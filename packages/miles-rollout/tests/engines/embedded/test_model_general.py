import pytest
import torch
from engine_models import load
from transformers import BloomConfig, BloomForCausalLM, MambaConfig, MambaForCausalLM

from miles.core.errors import EngineError
from miles.rollout.engines.embedded import model_general
from miles.rollout.engines.embedded.model import Checkpoint, load_model
from miles.rollout.engines.embedded.model_fast import unsupported

SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2}


def test_a_model_without_keys_and_values_is_refused(tmp_path):
    MambaForCausalLM(MambaConfig(**SMALL, state_size=4)).save_pretrained(tmp_path)
    with pytest.raises(EngineError, match="MambaForCausalLM cannot be served"):
        load(tmp_path)


def test_a_model_with_another_attention_is_refused(tmp_path):
    BloomForCausalLM(BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4)).save_pretrained(tmp_path)
    with pytest.raises(EngineError, match="BloomForCausalLM cannot be served"):
        load(tmp_path)


def test_a_model_whose_rows_come_out_wrong_is_refused(model_path, monkeypatch):
    monkeypatch.setattr(model_general, "attend", lambda *_, **__: None)
    with pytest.raises(EngineError, match=r"log-probabilities differ by .* from its own forward pass"):
        load(model_path("gpt-neox"))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "architecture GPT2LMHeadModel is not one of"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"intermediate_size": 100}, "multiple of 8"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rope type 'yarn'"),
        ({"quantization_config": {"bits": 4}}, "quantized"),
        ({}, None),
    ],
)
def test_what_the_fast_layer_leaves_to_the_general_one(change, reason):
    config = {"architectures": ["Qwen3ForCausalLM"], "intermediate_size": 96, **change}
    found = unsupported(config)
    assert found is None if reason is None else reason in found


def test_insisting_on_the_fast_layer(model_path):
    with pytest.raises(EngineError, match="--model-layer fast: architecture GPTNeoXForCausalLM"):
        load(model_path("gpt-neox"), kind="fast")


@pytest.mark.parametrize(
    ("config", "name", "dtype"),
    [
        ({"dtype": "bfloat16"}, "auto", torch.bfloat16),
        ({"torch_dtype": "float32"}, "auto", torch.float32),
        ({"torch_dtype": "float16"}, "auto", torch.float32),
        ({}, "auto", torch.float32),
        ({}, "bfloat16", torch.bfloat16),
    ],
)
def test_precision(tmp_path, config, name, dtype):
    assert Checkpoint(tmp_path, config, {}).dtype(name) is dtype


def test_a_precision_it_does_not_compute_in(tmp_path):
    with pytest.raises(EngineError, match="--dtype float16: the embedded engine computes in float32 or bfloat16"):
        Checkpoint(tmp_path, {}, {}).dtype("float16")


def test_end_of_text_ids_of_both_files(tmp_path):
    assert Checkpoint(tmp_path, {"eos_token_id": 3}, {"eos_token_id": [5, 3]}).eos_token_ids == (3, 5)


def test_a_directory_without_a_model(tmp_path):
    with pytest.raises(EngineError, match=r"--model-path .*: there is no config\.json"):
        load_model(Checkpoint.open(str(tmp_path)), torch.float32)
