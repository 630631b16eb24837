import pytest
import torch
import xxhash
from engine_models import Ask, generate, load, save_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from miles.core.weights.bucket import buckets
from miles.core.weights.delta import Change
from miles.core.weights.delta_code import encode
from miles.core.weights.shared_ring import RingLayout, RingWriter
from miles.rollout.engines.embedded.checker import WeightsChecker
from miles.rollout.engines.embedded.shared_bucket import BucketTensor, SharedBucket, SharedMemory
from miles.rollout.engines.embedded.weights import WeightError

PROMPT = [5, 6, 7, 8]


@pytest.fixture(params=["qwen3-tied", "qwen3-untied", "qwen3-moe", "llama3-biased", "gpt-neox"])
def served(request, model_path):
    return load(model_path(request.param))


@pytest.fixture
def small(model_path):
    return load(model_path("qwen3-tied"))


def write_bucket(path, tensors):
    """A stream of tensors in shared memory that holds all of it."""
    (whole,) = buckets(tensors.items(), 1 << 40)
    layout = RingLayout(1, whole.nbytes)
    path.write_bytes(bytes(layout.num_bytes))
    memory = torch.from_file(str(path), shared=True, size=layout.num_bytes, dtype=torch.uint8)
    writer = RingWriter(memory, layout, check=lambda: None)
    for slot, (_, tensor) in zip(whole.slots, tensors.items(), strict=True):
        writer.write(slot.offset, tensor)
    return SharedBucket(str(path), layout, 0, [BucketTensor.parse(slot.to_json()) for slot in whole.slots])


def take(model, bucket):
    return model.weights.take(SharedMemory().incoming(bucket))


def noise(model, dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    return {
        name: (0.1 * torch.randn(model.weights.read(name).shape, generator=generator)).to(dtype)
        for name in model.weights.names()
    }


def crc(tensor):
    return xxhash.xxh3_64_hexdigest(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())


def result(model):
    return generate(model, [Ask(PROMPT, {"max_new_tokens": 12, "temperature": 0.0})])[0]


def test_a_bucket_replaces_the_weights(served, tmp_path):
    new = noise(served)
    checksums = take(served, write_bucket(tmp_path / "bucket", new))
    assert checksums == {name: crc(tensor) for name, tensor in new.items()}
    for name, tensor in new.items():
        assert torch.equal(served.weights.read(name), tensor)


@pytest.mark.parametrize("name", ["qwen3-tied", "qwen3-wide", "llama3-biased", "gpt-neox"])
def test_new_weights_generate_what_a_fresh_engine_generates(model_path, tmp_path, name):
    served, fresh = load(model_path(name)), load(model_path(name))
    old = result(served).logps
    new = noise(served)
    take(served, write_bucket(tmp_path / "bucket", new))
    for tensor_name, tensor in new.items():
        fresh.weights.write(tensor_name, tensor)
    assert old != result(served).logps == result(fresh).logps


def test_checksums_are_in_the_precision_of_the_bucket(small, tmp_path):
    new = noise(small, torch.bfloat16)
    checksums = take(small, write_bucket(tmp_path / "bucket", new))
    assert checksums == {name: crc(tensor) for name, tensor in new.items()}


def test_a_lossy_copy_shows_in_the_checksum(model_path, tmp_path):
    served = load(model_path("qwen3-tied"), torch.bfloat16)
    new = noise(served)
    checksums = take(served, write_bucket(tmp_path / "bucket", new))
    assert checksums["model.norm.weight"] != crc(new["model.norm.weight"])


def test_experts_are_taken_one_by_one_or_as_transformers_holds_them(model_path, tmp_path):
    """The module's own names stack the experts; checkpoints list them."""
    served = load(model_path("qwen3-moe"))
    module = AutoModelForCausalLM.from_pretrained(model_path("qwen3-moe"), dtype=torch.float32)
    before = {name: served.weights.checksum(name) for name in served.weights.names()}
    assert "model.layers.0.mlp.experts.5.down_proj.weight" in before
    stacked = {name: tensor for name, tensor in module.state_dict().items() if "rotary" not in name}
    assert any(name.endswith("experts.gate_up_proj") for name in stacked)
    for name in served.weights.names():
        served.weights.write(name, torch.zeros_like(served.weights.read(name)))
    checksums = take(served, write_bucket(tmp_path / "bucket", stacked))
    assert checksums == {name: crc(tensor) for name, tensor in stacked.items()}
    assert {name: served.weights.checksum(name) for name in served.weights.names()} == before


def test_the_tied_head_is_taken_under_both_names(small, tmp_path):
    table = noise(small)["model.embed_tokens.weight"]
    take(small, write_bucket(tmp_path / "bucket", {"lm_head.weight": table}))
    assert torch.equal(small.weights.read("model.embed_tokens.weight"), table)


def test_an_unknown_tensor_changes_nothing(small, tmp_path):
    before = small.weights.checksum("model.norm.weight")
    new = {"model.norm.weight": torch.zeros(48), "model.nrom.weight": torch.zeros(48)}
    with pytest.raises(WeightError, match=r"has no model\.nrom\.weight"):
        take(small, write_bucket(tmp_path / "bucket", new))
    assert small.weights.checksum("model.norm.weight") == before


def test_a_wrong_shape_changes_nothing(small, tmp_path):
    before = small.weights.checksum("model.norm.weight")
    new = {"model.norm.weight": torch.zeros(48), "model.layers.0.input_layernorm.weight": torch.zeros(47)}
    with pytest.raises(WeightError, match=r"input_layernorm\.weight: the model holds \[48\], the update has \[47\]"):
        take(small, write_bucket(tmp_path / "bucket", new))
    assert small.weights.checksum("model.norm.weight") == before


def test_a_checkpoint_directory_replaces_the_weights(small, tmp_path):
    other = save_model("qwen3-tied", tmp_path / "other")
    tensors = {name: tensor + 1 for name, tensor in load_file(other / "model.safetensors").items()}
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    small.weights.load_directory(other)
    assert all(torch.equal(small.weights.read(name), tensor) for name, tensor in tensors.items())


def test_an_incomplete_checkpoint_changes_nothing(small, tmp_path):
    before = result(small).logps
    other = save_model("qwen3-tied", tmp_path / "other")
    tensors = {name: tensor + 1 for name, tensor in load_file(other / "model.safetensors").items()}
    del tensors["model.norm.weight"]
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(WeightError, match=r"lacks model\.norm\.weight"):
        small.weights.load_directory(other)
    assert result(small).logps == before


def test_a_directory_without_safetensors_is_refused(small, tmp_path):
    with pytest.raises(WeightError, match=r"holds no \*\.safetensors"):
        small.weights.load_directory(tmp_path)


def test_query_norms_reach_every_head(small):
    small.weights.write("model.layers.1.self_attn.q_norm.weight", torch.full((16,), 2.5))
    small.weights.write("model.layers.1.self_attn.k_norm.weight", torch.full((16,), 0.5))
    held = small._layers[1].head_norm
    assert held.tolist() == [[2.5] * 16] * 4 + [[0.5] * 16] * 2


def test_the_checker_finds_what_an_update_missed(small):
    checker = WeightsChecker(small.weights)
    originals = {name: small.weights.read(name).clone() for name in small.weights.names()}
    assert checker.run("snapshot")["success"]
    checker.run("reset_tensors")
    for name, tensor in originals.items():
        if name != "model.layers.1.mlp.down_proj.weight":
            small.weights.write(name, tensor)
    with pytest.raises(
        WeightError, match=r"1 tensors differ from the snapshot: model\.layers\.1\.mlp\.down_proj\.weight"
    ):
        checker.run("compare")
    small.weights.write("model.layers.1.mlp.down_proj.weight", originals["model.layers.1.mlp.down_proj.weight"])
    assert checker.run("compare")["success"]


def test_the_checker_refuses_what_makes_no_sense(small):
    checker = WeightsChecker(small.weights)
    with pytest.raises(WeightError, match="no snapshot"):
        checker.run("compare")
    with pytest.raises(WeightError, match="action is 'verify'"):
        checker.run("verify")


def test_checksums_cover_every_tensor(small):
    report = WeightsChecker(small.weights).run("checksum")
    assert sorted(report["ranks"][0]["checksums"]) == sorted(small.weights.names())
    small.weights.write("model.norm.weight", torch.zeros(48))
    assert WeightsChecker(small.weights).run("checksum")["per_engine_checksum"] != report["per_engine_checksum"]


def test_changes_lead_to_the_same_weights_as_whole_tensors(served):
    new = {name: served.weights.read(name).clone() for name in served.weights.names()}
    wire, entries = [], {}
    for name, tensor in new.items():
        old = tensor.clone()
        tensor.view(-1)[:: max(1, tensor.numel() // 3)] += 0.5
        change, count = encode(old, tensor)
        wire.append((name, change))
        entries[name] = ("float32", count)
    checksums = served.weights.take(wire, Change("1", entries))
    assert checksums == {name: crc(tensor) for name, tensor in new.items()}
    for name, tensor in new.items():
        assert torch.equal(served.weights.read(name), tensor)


def test_a_change_beyond_the_tensor_is_refused(small):
    change, count = encode(torch.zeros(10_000), torch.zeros(10_000).index_fill_(0, torch.tensor([9_999]), 1.0))
    with pytest.raises(WeightError, match=r"norm\.weight: a change at element 9999 of 48"):
        small.weights.take([("model.norm.weight", change)], Change("1", {"model.norm.weight": ("float32", count)}))


@pytest.mark.parametrize("name", ["qwen3-tied", "gpt2"])
def test_released_memory_is_really_gone_and_comes_back(model_path, name):
    model = load(model_path(name))
    before = {tensor: model.weights.read(tensor).clone() for tensor in model.weights.names()}
    assert model.weights.release() >= model.weights.num_bytes
    with pytest.raises(WeightError, match="released"):
        model.weights.read(next(iter(before)))
    with pytest.raises(WeightError, match="released"):
        model.weights.write(next(iter(before)), next(iter(before.values())))
    model.weights.restore()
    assert model.weights.unsent == set(before)
    for tensor, value in before.items():
        model.weights.write(tensor, value)
    assert not model.weights.unsent
    for tensor, value in before.items():
        assert torch.equal(model.weights.read(tensor), value)


def test_two_tensors_for_one_place_do_not_both_pass(model_path):
    model = load(model_path("qwen3-tied"))
    first = torch.ones_like(model.weights.read("model.embed_tokens.weight"))
    held = model.weights.take([("model.embed_tokens.weight", first), ("lm_head.weight", 2 * first)])
    assert held["model.embed_tokens.weight"] == held["lm_head.weight"] == crc(2 * first)
