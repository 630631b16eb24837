import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import miles.megatron.streamed_files as streamed_files
from miles.megatron.convert import main
from miles.megatron.hf_files import HfTensors
from miles.megatron.stored_model import HfValues

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("family", ["qwen3 moe", "qwen2", "glm4", "glm4 moe", "deepseek", "gpt oss"])
def test_there_and_back_is_the_same_bit_for_bit(checkpoint, on_ranks, tmp_path, capfd, family):
    source = str(checkpoint(family))
    torch_dist, back = str(tmp_path / "torch_dist"), str(tmp_path / "back")

    def convert(make):
        there = main(["to-torch-dist", "--hf-checkpoint", source, "--save", torch_dist])
        return there, main(["to-hf", "--hf-checkpoint", source, "--load", torch_dist, "--save", back])

    assert on_ranks(1, convert) == [(0, 0)]
    before, after = load_file(f"{source}/model.safetensors"), load_file(f"{back}/model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert "equal bit for bit" in capfd.readouterr().out


def test_a_converted_checkpoint_is_a_reference(checkpoint, config, rollout, on_ranks, tmp_path):
    converted = str(tmp_path / "torch_dist")

    def convert(make):
        return main(["to-torch-dist", "--hf-checkpoint", str(checkpoint()), "--save", converted])

    def losses(**flags):
        kl = {"use_kl_loss": True, "kl_loss_coef": 0.1, "num_steps_per_rollout": 2}
        parallel = {"tensor_model_parallel_size": 2}
        return on_ranks(2, lambda make: make(config(**kl, **parallel, **flags)).train(rollout()).steps)[0]

    assert on_ranks(1, convert) == [0]
    assert losses(ref_load=converted) == losses()


@pytest.mark.parametrize("family", ["qwen3", "qwen3 moe"])
def test_a_run_begins_with_the_weights_that_load_names(checkpoint, config, rollout, on_ranks, tmp_path, family):
    """A release or a Hugging Face directory; norms of gradients count the same as from --hf-checkpoint."""
    source, other, converted = str(checkpoint(family)), tmp_path / "other", str(tmp_path / "torch_dist")
    parallel = {"tensor_model_parallel_size": 2, "sequence_parallel": True}

    def convert(make):
        return main(["to-torch-dist", "--hf-checkpoint", str(other), "--save", converted])

    def steps(**flags):
        return on_ranks(2, lambda make: make(config(family, **parallel, **flags)).train(rollout()).steps)[0]

    shutil.copytree(source, other)
    trained = {name: 1.1 * tensor for name, tensor in load_file(f"{source}/model.safetensors").items()}
    save_file(trained, other / "model.safetensors", metadata={"format": "pt"})
    assert on_ranks(1, convert) == [0]
    expected = steps(hf_checkpoint=str(other))
    assert steps(load=converted) == steps(load=str(other)) == expected
    assert steps() != expected


def test_what_is_no_checkpoint_and_what_exists_is_said(checkpoint, on_ranks, tmp_path, capfd):
    source = str(checkpoint())

    def convert(make):
        missing = main(["to-hf", "--hf-checkpoint", source, "--load", str(tmp_path / "no"), "--save", str(tmp_path)])
        (tmp_path / "there" / "release").mkdir(parents=True)
        return missing, main(["to-torch-dist", "--hf-checkpoint", source, "--save", str(tmp_path / "there")])

    assert on_ranks(1, convert) == [(1, 1)]
    said = capfd.readouterr().err
    assert "no checkpoint of the megatron backend" in said
    assert "exists already" in said


LAYOUTS = {
    "tp pp": (4, {"tensor_model_parallel_size": 2, "sequence_parallel": True, "pipeline_model_parallel_size": 2}),
    "ep": (2, {"expert_model_parallel_size": 2}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_state_of_a_run_in_any_layout_becomes_a_model(checkpoint, config, on_ranks, tmp_path, layout):
    count, flags = LAYOUTS[layout]
    source, state, back = str(checkpoint("qwen3 moe")), tmp_path / "actor", str(tmp_path / "back")
    state.mkdir()

    def save(make):
        make(config("qwen3 moe", **flags)).save(state)

    def convert(make):
        return main(["to-hf", "--hf-checkpoint", source, "--load", str(state), "--save", back])

    on_ranks(count, save)
    assert on_ranks(1, convert) == [0]
    before, after = load_file(f"{source}/model.safetensors"), load_file(f"{back}/model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_a_checkpoint_of_a_run_is_converted_in_the_words_of_other_scripts(checkpoint, config, on_ranks, tmp_path):
    source, back = str(checkpoint("qwen2")), str(tmp_path / "back")
    (tmp_path / "iter_0000007" / "actor").mkdir(parents=True)

    def run(make):
        make(config("qwen2")).save(tmp_path / "iter_0000007" / "actor")
        flags = ["--input-dir", str(tmp_path / "iter_0000007"), "--origin-hf-dir", source, "--output-dir", back]
        return main(["to-hf", *flags])

    assert on_ranks(1, run) == [0]
    before, after = load_file(f"{source}/model.safetensors"), load_file(f"{back}/model.safetensors")
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_files_are_cut_at_a_size_and_indexed(checkpoint, on_ranks, tmp_path, monkeypatch):
    source = str(checkpoint("qwen2"))
    torch_dist, back = str(tmp_path / "torch_dist"), str(tmp_path / "back")
    monkeypatch.setattr(streamed_files, "_MAX_FILE_BYTES", 20_000)

    def convert(make):
        there = main(["to-torch-dist", "--hf-checkpoint", source, "--save", torch_dist])
        return there, main(["to-hf", "--hf-checkpoint", source, "--load", torch_dist, "--save", back])

    assert on_ranks(1, convert) == [(0, 0)]
    stored = HfTensors(tmp_path / "back")
    before = load_file(f"{source}/model.safetensors")
    assert set(stored.names) == set(before)
    assert all(torch.equal(stored.get(name), tensor) for name, tensor in before.items())
    assert len(list((tmp_path / "back").glob("*.safetensors"))) > 3


def test_a_changed_result_is_found(checkpoint, on_ranks, tmp_path, capfd, monkeypatch):
    source = str(checkpoint("qwen2"))
    pieces = HfValues.pieces
    monkeypatch.setattr(HfValues, "pieces", lambda *arguments: [piece + 1.0 for piece in pieces(*arguments)])

    def convert(make):
        return main(["to-torch-dist", "--hf-checkpoint", source, "--save", str(tmp_path / "torch_dist")])

    assert on_ranks(1, convert) == [1]
    assert "differs from" in capfd.readouterr().err
