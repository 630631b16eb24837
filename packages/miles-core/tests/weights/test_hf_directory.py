import json

import torch
from safetensors.torch import load_file

from miles.core.weights import hf_directory
from miles.core.weights.hf_directory import copy_companions, save_weights


def test_large_models_are_written_in_several_files_with_an_index(tmp_path, monkeypatch):
    monkeypatch.setattr(hf_directory, "_MAX_SHARD_BYTES", 100)
    weights = [(f"w{i}", torch.full((20,), float(i))) for i in range(3)]
    save_weights(weights, tmp_path)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert sorted(index["weight_map"].values()) == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert index["metadata"]["total_size"] == 240
    loaded = {name: load_file(tmp_path / file)[name] for name, file in index["weight_map"].items()}
    assert all(torch.equal(loaded[name], tensor) for name, tensor in weights)


def test_companions_are_copied_and_configurations_are_not(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir(), target.mkdir()
    for name in ("tokenizer.json", "chat_template.jinja", "config.json", "model.safetensors.index.json"):
        (source / name).write_text("{}")
    copy_companions(source, target)
    assert sorted(path.name for path in target.iterdir()) == ["chat_template.jinja", "tokenizer.json"]
