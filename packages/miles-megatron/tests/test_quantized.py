"""Quantized tensors have the values that their formats define; transformers' own reading agrees."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from miles.core.errors import TrainingError
from miles.core.training.micro_batch import pack, response_offsets
from miles.megatron.constants import write_hf_config
from miles.megatron.convert import main
from miles.megatron.hf_files import HfTensors
from miles.megatron.packed_inputs import PackedInputs
from miles.megatron.quantized import block_fp8_values, mxfp4_values

FAMILY = "gpt oss of whole blocks"
MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
QUANTIZED = ("gate_up_proj", "down_proj")


def test_every_byte_of_mxfp4_with_every_scale_is_its_value():
    blocks = torch.arange(256, dtype=torch.uint8).view(16, 16).repeat(255, 1, 1)
    scales = torch.arange(255, dtype=torch.uint8).view(255, 1).repeat(1, 16)
    sign, magnitude = np.array([1.0, -1.0]), np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    codes = np.arange(256)
    halves = np.stack([codes & 15, codes >> 4], 1).reshape(-1)
    values = sign[halves // 8] * magnitude[halves % 8]
    expected = values[None] * 2.0 ** (np.arange(255.0) - 127)[:, None]
    assert torch.equal(mxfp4_values(blocks, scales).view(255, 512), torch.from_numpy(expected).bfloat16())


def test_a_scale_of_mxfp4_that_is_not_a_number_is_kept_as_such():
    assert mxfp4_values(torch.ones(1, 16, dtype=torch.uint8), torch.tensor([255], dtype=torch.uint8)).isnan().all()


def test_mxfp4_is_read_as_transformers_reads_it():
    blocks, scales = random_mxfp4((3, 8, 64), torch.Generator().manual_seed(0))
    assert torch.equal(mxfp4_values(blocks, scales).mT, convert_moe_packed_tensors(blocks, scales))


def test_fp8_is_multiplied_block_by_block_also_where_the_last_one_is_cut():
    weight = torch.randn(5, 7, generator=torch.Generator().manual_seed(0)).to(torch.float8_e4m3fn)
    scales = torch.tensor([[1.5, 2.0], [3.0, 0.25], [1.0, 7.0]])
    values = block_fp8_values(weight, scales, (2, 4))
    for row in range(5):
        for column in range(7):
            expected = weight[row, column].float() * scales[row // 2, column // 4]
            assert values[row, column] == expected.bfloat16()


def random_mxfp4(shape, generator):
    """Blocks and scales of a tensor whose values are of the size of weights."""
    blocks = torch.randint(0, 256, (*shape[:-1], shape[-1] // 32, 16), dtype=torch.uint8, generator=generator)
    return blocks, torch.randint(120, 126, blocks.shape[:-1], dtype=torch.uint8, generator=generator)


@pytest.fixture
def published(checkpoint, tmp_path):
    """A GPT-OSS checkpoint as it is published."""
    source, directory = checkpoint(FAMILY), tmp_path / "published"
    directory.mkdir()
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        if name.endswith(QUANTIZED):
            blocks, scales = random_mxfp4(tensor.mT.shape, generator)
            tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        else:
            tensors[name] = tensor.bfloat16()
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text()) | {"quantization_config": MXFP4}
    config.pop("dtype", None)
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@pytest.mark.slow
def test_a_published_gpt_oss_computes_what_it_does_in_transformers(published, config, rollout, on_ranks):
    batch = rollout()

    def run(make):
        settings = config(FAMILY, hf_checkpoint=str(published))
        actor = make(settings)
        offsets = response_offsets(batch)
        inputs = PackedInputs.of(pack(batch, range(len(batch)), offsets, torch.device("cpu")), actor._site.layout)
        chunk = actor._chunks[0]
        with torch.no_grad():
            return actor._blueprint.head(settings)(chunk, chunk(inputs), inputs, "logits")

    (logits,) = on_ranks(1, run)
    model = AutoModelForCausalLM.from_pretrained(published, attn_implementation="eager", dtype=torch.bfloat16)
    model = model.float()
    expected = torch.cat([model(torch.from_numpy(tokens)[None]).logits[0] for tokens in batch.tokens])
    torch.testing.assert_close(logits, expected.detach(), atol=5e-5, rtol=1e-4)


@pytest.mark.slow
def test_a_published_gpt_oss_is_converted_and_exported_in_bf16(published, on_ranks, tmp_path):
    torch_dist, back = str(tmp_path / "torch_dist"), tmp_path / "back"

    def convert(make):
        there = main(["to-torch-dist", "--hf-checkpoint", str(published), "--save", torch_dist])
        return there, main(["to-hf", "--hf-checkpoint", str(published), "--load", torch_dist, "--save", str(back)])

    assert on_ranks(1, convert) == [(0, 0)]
    stored, exported = load_file(published / "model.safetensors"), load_file(back / "model.safetensors")
    for name, tensor in exported.items():
        packed = name.endswith(QUANTIZED)
        expected = (
            convert_moe_packed_tensors(stored[f"{name}_blocks"], stored[f"{name}_scales"]) if packed else stored[name]
        )
        assert torch.equal(tensor, expected), name


def test_the_configuration_of_an_export_says_bf16_and_so_does_the_log(published, tmp_path, caplog):
    write_hf_config(published, tmp_path, torch.bfloat16)
    written = json.loads((tmp_path / "config.json").read_text())
    assert "quantization_config" not in written
    assert written["dtype"] == "bfloat16"
    assert f"is quantized (mxfp4); the weights in {tmp_path} are in bfloat16" in caplog.text


def test_weights_in_another_format_are_refused_by_its_name(published):
    config = json.loads((published / "config.json").read_text()) | {"quantization_config": {"quant_method": "awq"}}
    (published / "config.json").write_text(json.dumps(config))
    with pytest.raises(TrainingError, match=r"quantized \(awq\).*Give a checkpoint in bf16"):
        HfTensors(published)
