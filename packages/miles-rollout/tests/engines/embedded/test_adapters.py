"""An adapter that the engine adds gives what the same adapter gives when it is part of the weights."""

from __future__ import annotations

import pytest
import torch
from engine_models import Ask, Driver, bits, generate, load, random_asks
from safetensors.torch import save_file

from miles.core.weights.adapter_form import AdapterForm
from miles.rollout.engines.embedded.adapters import Adapters
from miles.rollout.engines.embedded.checker import WeightsChecker
from miles.rollout.engines.embedded.weights import WeightError

FAST = ["qwen3-tied", "qwen3-wide", "qwen3-moe", "llama3-biased"]
GENERAL = ["gpt-neox", "gemma2"]
PROMPT = list(range(3, 43))


def form_of(model, rank=4, keep=lambda layer: True):
    return AdapterForm(rank, 2.0 * rank, tuple(layer for layer in model.adapter_places if keep(layer)))


def values(model, form, seed=0):
    """Random values for an adapter of ``form``, large enough to matter."""
    generator, tensors = torch.Generator().manual_seed(seed), {}
    for layer in form.layers:
        place = model.adapter_places[layer]
        inputs = place.host.weight.shape[1]
        for name, shape in (("lora_A", (form.rank, inputs)), ("lora_B", (len(place.outputs), form.rank))):
            tensors[f"{layer}.{name}.weight"] = torch.randn(shape, generator=generator) * shape[1] ** -0.5 * 0.3
    return tensors


def give(model, path, form, tensors):
    """An update."""
    adapters = Adapters(model.adapter_places, model.weights, path)
    adapters.expect(form)
    model.weights.take(tensors.items())
    return adapters


def merge(model, form, tensors):
    """The adapter as part of the weights."""
    for layer in form.layers:
        a, b = (tensors[f"{layer}.{part}.weight"] for part in ("lora_A", "lora_B"))
        name = f"{layer}.weight"
        model.weights.write(name, model.weights.read(name) + form.scale * (b @ a))


def scores(model, tokens=PROMPT):
    driver = Driver(model)
    driver.add([Ask(tokens, {"max_new_tokens": 0}, options={"score_from": 0})])
    driver.run()
    return torch.tensor(driver.sequences[0].prompt_logps)


@pytest.mark.parametrize("name", FAST + GENERAL)
def test_an_adapter_that_is_added_scores_as_one_that_is_merged(model_path, name):
    served, merged = load(model_path(name)), load(model_path(name))
    form = form_of(served)
    tensors = values(served, form)
    before = scores(served)
    give(served, model_path(name), form, tensors)
    merge(merged, form, tensors)
    found, expected = scores(served), scores(merged)
    assert float((found - before).abs().max()) > 0.05
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "keep", [lambda layer: layer.endswith(("k_proj", "up_proj")), lambda layer: "layers.1" in layer]
)
def test_some_layers_alone(model_path, keep):
    path = model_path("qwen3-tied")
    served, merged = load(path), load(path)
    form = form_of(served, keep=keep)
    tensors = values(served, form)
    give(served, path, form, tensors)
    merge(merged, form, tensors)
    torch.testing.assert_close(scores(served), scores(merged), atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["qwen3-tied", "qwen3-wide", "qwen3-moe", "gpt-neox"])
def test_a_request_has_the_same_bits_alone_and_in_a_crowd(model_path, name, dtype):
    served = load(model_path(name), dtype)
    form = form_of(served, rank=3)
    give(served, model_path(name), form, values(served, form))
    asks = random_asks(24, longest_output=30)
    crowd = [bits(result) for result in generate(served, asks)]
    assert [bits(generate(served, [asks[number]])[0]) for number in (0, 11, 23)] == [crowd[n] for n in (0, 11, 23)]
    tokens, logps = crowd[11]
    driver = Driver(served)
    prompt = asks[11].prompt
    params = {**asks[11].params, "max_new_tokens": 0}
    driver.add([Ask(prompt + tokens, params, options={"score_from": len(prompt) - 1, "scales_scores": True})])
    driver.run()
    if asks[11].params["temperature"]:
        assert driver.sequences[0].prompt_logps == logps


def test_whole_weights_end_an_adapter(model_path):
    path = model_path("qwen3-tied")
    served = load(path)
    before, form = scores(served), form_of(served)
    adapters = give(served, path, form, values(served, form))
    assert len(served.weights.names()) > len(served.weights.updated_names()) == len(form.names())
    adapters.expect(None)
    assert torch.equal(scores(served), before)
    with pytest.raises(WeightError, match="this model has no"):
        served.weights.take(values(served, form).items())


def test_an_adapter_lies_over_the_weights_on_disk(model_path):
    path = model_path("qwen3-tied")
    served, other = load(path), load(path)
    form = form_of(served)
    tensors = values(served, form)
    for name in served.weights.names():
        served.weights.write(name, served.weights.read(name) * 1.5)
    for model in (served, other):
        give(model, path, form, tensors)
    assert torch.equal(scores(served), scores(other))
    served.weights.release()
    served.weights.restore()
    give(served, path, form, tensors)
    assert not served.weights.unsent
    assert torch.equal(scores(served), scores(other))


def test_the_same_form_again_keeps_what_is_not_sent(model_path):
    path = model_path("qwen3-tied")
    served = load(path)
    form = form_of(served)
    adapters = give(served, path, form, values(served, form))
    before = scores(served)
    adapters.expect(form)
    assert torch.equal(scores(served), before)


def test_layers_and_shapes_of_another_model_are_refused(model_path):
    path = model_path("qwen3-moe")
    served = load(path)
    adapters = Adapters(served.adapter_places, served.weights, path)
    with pytest.raises(WeightError, match=r"adds no adapter to model\.layers\.0\.mlp\.gate "):
        adapters.expect(AdapterForm(2, 2.0, ("model.layers.0.mlp.gate",)))
    layer = "model.layers.0.self_attn.k_proj"
    adapters.expect(AdapterForm(2, 2.0, (layer,)))
    with pytest.raises(WeightError, match=r"the model holds \[2, 48\], the update has \[3, 48\]"):
        served.weights.take([(f"{layer}.lora_A.weight", torch.zeros(3, 48))])


def test_an_adapter_comes_by_files_too(model_path, tmp_path):
    path = model_path("qwen3-tied")
    served, other = load(path), load(path)
    form = form_of(served)
    tensors = values(served, form)
    give(other, path, form, tensors)
    save_file(tensors, tmp_path / "model-00000.safetensors")
    Adapters(served.adapter_places, served.weights, path).expect(form)
    served.weights.load_directory(tmp_path)
    assert torch.equal(scores(served), scores(other))
    del tensors[form.names()[0]]
    save_file(tensors, tmp_path / "model-00000.safetensors")
    with pytest.raises(WeightError, match=f"lacks {form.names()[0]}"):
        served.weights.load_directory(tmp_path)


def test_the_checker_scrambles_what_updates_bring(model_path):
    path = model_path("qwen3-tied")
    served = load(path)
    form = form_of(served)
    tensors = values(served, form)
    give(served, path, form, tensors)
    checker, before = WeightsChecker(served.weights), scores(served)
    checker.run("snapshot")
    checker.run("reset_tensors")
    assert not torch.equal(scores(served), before)
    with pytest.raises(WeightError, match="differ from the snapshot"):
        checker.run("compare")
    served.weights.take(tensors.items())
    checker.run("compare")
    assert torch.equal(scores(served), before)
    assert served.weights.are_as_loaded
