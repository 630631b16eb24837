"""Routed experts are those of transformers' router, whatever way a token's keys and values came about."""

import base64

import numpy as np
import pytest
import torch
from engine_models import Ask, Driver, generate, random_asks
from transformers import AutoModelForCausalLM

from miles.core.errors import EngineError
from miles.rollout.engines.embedded.model import Checkpoint, load_model
from miles.rollout.engines.embedded.protocol import GenerateItem, parse_generate, render

LAYERS, PER_TOKEN, DENSE = 3, 2, 1
WANTED = {"wants_experts": True}


@pytest.fixture(scope="module")
def served(model_path):
    return load_model(Checkpoint.open(str(model_path("qwen3-moe"))), torch.float32, keep_experts=True)


@pytest.fixture(scope="module")
def reference(model_path):
    return AutoModelForCausalLM.from_pretrained(model_path("qwen3-moe"), dtype=torch.float32).eval()


@torch.no_grad()
def expected(reference, tokens):
    """[tokens - 1, layers, per token], sorted; the dense layer is zeros."""
    logits = reference(torch.tensor([tokens[:-1]]), output_router_logits=True).router_logits
    chosen = [layer.topk(PER_TOKEN, -1).indices for layer in logits]
    chosen.insert(DENSE, torch.zeros_like(chosen[0]))
    return np.sort(torch.stack(chosen, 1).numpy(), -1)


def assert_experts(reference, progress):
    sequence = progress.sequence
    found = sequence.experts
    assert found.dtype == np.int32
    np.testing.assert_array_equal(np.sort(found, -1), expected(reference, sequence.prompt + progress.tokens))


def with_experts(asks):
    return [Ask(ask.prompt, ask.params, ask.seed, ask.stop_ids, {**ask.options, **WANTED}) for ask in asks]


def test_experts_of_prompt_and_response(served, reference):
    for progress in generate(served, with_experts(random_asks(12, longest_prompt=80, longest_output=90))):
        assert_experts(reference, progress)


def test_a_group_with_one_prompt_gets_the_experts_of_the_prompt_as_well(served, reference):
    asks = with_experts([Ask(list(range(3, 50)), {"max_new_tokens": 5 + 30 * n}, seed=n) for n in range(4)])
    for progress in generate(served, asks):
        assert_experts(reference, progress)


def test_a_prompt_longer_than_a_chunk(served, reference):
    prompt = [3 + n % 300 for n in range(700)]
    assert_experts(reference, generate(served, with_experts([Ask(prompt, {"max_new_tokens": 4})]))[0])


def test_a_prompt_alone(served, reference):
    progress = generate(served, with_experts([Ask([5, 6, 7, 8], {"max_new_tokens": 0})]))[0]
    assert_experts(reference, progress)


def test_retracted_sequences_keep_theirs(served, reference):
    driver = Driver(served)
    driver.add(with_experts([Ask([5, 6, 7], {"max_new_tokens": 20}), Ask([8, 9], {"max_new_tokens": 20})]))
    driver.run(6)
    driver.scheduler.pause("retract")
    driver.scheduler.abort(lambda sequence: sequence.rid == "1")
    driver.scheduler.resume()
    driver.run()
    assert driver.finals[1].finish["type"] == "abort"
    for progress in driver.finals.values():
        assert_experts(reference, progress)


def test_where_they_are_not_wanted_nothing_is_kept(model):
    progress = generate(model("qwen3-moe"), [Ask([5, 6, 7, 8], {"max_new_tokens": 4})])[0]
    assert progress.sequence.experts is None
    assert model("qwen3-moe").kv_shape.experts_per_token == 0


def test_on_the_wire_they_are_base64_of_int32(served):
    progress = generate(served, with_experts([Ask([5, 6, 7, 8], {"max_new_tokens": 4})]))[0]
    item = parse_generate({"input_ids": [5, 6, 7, 8], "return_routed_experts": True}).items[0]
    assert isinstance(item, GenerateItem)
    data = render(progress, item, None)["meta_info"]["routed_experts"]
    flat = np.frombuffer(base64.b64decode(data), "<i4")
    np.testing.assert_array_equal(flat.reshape(7, LAYERS, PER_TOKEN), progress.sequence.experts)


def test_memory_of_experts_counts(served, model):
    more = served.kv_shape.token_bytes - model("qwen3-moe").kv_shape.token_bytes
    assert more == LAYERS * PER_TOKEN * 4


@pytest.mark.parametrize(("name", "message"), [("qwen3-tied", "has no experts"), ("gpt2", "only the fast layer")])
def test_models_that_cannot_are_refused(model_path, name, message):
    with pytest.raises(EngineError, match=message):
        load_model(Checkpoint.open(str(model_path(name))), torch.float32, keep_experts=True)


def test_keeping_them_changes_no_token(served, model):
    asks = random_asks(6)
    for kept, plain in zip(generate(served, asks), generate(model("qwen3-moe"), asks), strict=True):
        assert (kept.tokens, kept.logps) == (plain.tokens, plain.logps)
