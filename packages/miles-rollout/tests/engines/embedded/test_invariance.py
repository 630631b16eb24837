"""A request's tokens and log-probabilities are the same to the bit, whatever happens around it."""

import random
from dataclasses import replace

import pytest
import torch
from engine_models import CONTEXT, VOCABULARY, Ask, Driver, bits, generate, load, random_asks

from miles.rollout.engines.embedded.scheduler import Limits

pytestmark = pytest.mark.slow

MODELS = ["qwen3-tied", "qwen3-wide", "qwen3-moe", "qwen3-untied", "qwen2", "llama", "gpt-neox", "gemma2"]


@pytest.fixture(params=MODELS)
def served(request, model):
    return model(request.param)


def test_alone_and_in_a_crowd(served):
    asks = random_asks(40)
    crowd = [bits(result) for result in generate(served, asks)]
    for number in (0, 7, 21, 39):
        assert bits(generate(served, [asks[number]])[0]) == crowd[number]


@pytest.mark.parametrize("threads", [2, 3])
@pytest.mark.parametrize("name", ["qwen3-tied", "qwen3-wide", "gpt-neox"])
def test_alone_and_in_a_crowd_with_threads(model, name, threads):
    torch.set_num_threads(threads)
    asks = random_asks(16, longest_output=12)
    crowd = [bits(result) for result in generate(model(name), asks)]
    assert bits(generate(model(name), [asks[11]])[0]) == crowd[11]


def test_arriving_one_by_one(served):
    asks = random_asks(40)
    together = [bits(result) for result in generate(served, asks)]
    driver, draw = Driver(served), random.Random(1)
    for ask in asks:
        driver.add([ask])
        driver.run(steps=draw.randint(0, 4))
    assert [bits(result) for result in driver.run()] == together


def test_a_shared_prompt_and_a_computed_one(served):
    prompt = [5 + n % 17 for n in range(45)]
    asks = [Ask(prompt, {"max_new_tokens": 12}, seed=number) for number in range(6)]
    driver = Driver(served)
    driver.add(asks)
    shared = driver.run()
    assert [sequence.cached_tokens for sequence in driver.sequences.values()] == [0, 45, 45, 45, 45, 45]
    assert [bits(result) for result in shared] == [bits(generate(served, [ask])[0]) for ask in asks]


def test_a_prompt_that_arrives_while_an_equal_one_is_decoding(served):
    asks = [Ask([9, 8, 7, 6], {"max_new_tokens": 20}, seed=number) for number in range(3)]
    driver = Driver(served)
    for ask in asks:
        driver.add([ask])
        driver.run(steps=5)
    late = driver.run()
    assert driver.sequences[2].cached_tokens == 4
    assert [bits(result) for result in late] == [bits(result) for result in generate(served, asks)]


def test_retraction_and_recomputation(served):
    asks = random_asks(12, seed=3)
    undisturbed = [bits(result) for result in generate(served, asks)]
    driver = Driver(served)
    driver.add(asks)
    for _ in range(4):
        driver.run(steps=5)
        driver.scheduler.pause("retract")
        assert not driver.scheduler.running()
        driver.scheduler.resume()
    assert [bits(result) for result in driver.run()] == undisturbed


def test_long_outputs(served):
    """Longer than a span of attention and than the slots they start in."""
    asks = [Ask(list(range(3, 20 + n)), {"max_new_tokens": 150 + 97 * n}, seed=n) for n in range(5)]
    together = [bits(result) for result in generate(served, asks)]
    assert bits(generate(served, [asks[0]])[0]) == together[0]
    assert bits(generate(served, [asks[3]])[0]) == together[3]


def test_too_little_memory_for_all(served):
    asks = random_asks(24, seed=4, longest_output=150)
    plenty = [bits(result) for result in generate(served, asks)]
    driver = Driver(served, Limits(context_length=CONTEXT, kv_tokens=700))
    driver.add(asks)
    assert [bits(result) for result in driver.run()] == plenty
    assert driver.scheduler.counters.retracted > 0
    driver.assert_empty()


def test_a_partial_response_that_is_continued(served):
    """A new request with the tokens so far goes on as the old one would have."""
    ask = Ask([4, 5, 6, 7, 8], {"max_new_tokens": 30}, seed=11)
    tokens, logps = bits(generate(served, [ask])[0])
    resumed = replace(ask, prompt=ask.prompt + tokens[:13], params={"max_new_tokens": 17})
    assert bits(generate(served, [resumed])[0]) == (tokens[13:], logps[13:])


def test_log_probs_of_scoring_and_of_generating(served):
    prompt = list(range(10, 30))
    tokens, logps = bits(generate(served, [Ask(prompt, {"max_new_tokens": 40}, seed=2)])[0])
    driver = Driver(served)
    score = {"score_from": len(prompt) - 1}
    driver.add([Ask(prompt + tokens, {"max_new_tokens": 0}, options=score), *random_asks(5)])
    driver.run()
    assert driver.sequences[0].prompt_logps == logps


def test_a_prompt_longer_than_a_chunk_beside_short_ones(model):
    served = model("qwen3-tied")
    draw = random.Random(0)
    long = Ask([draw.randrange(3, VOCABULARY) for _ in range(900)], {"max_new_tokens": 20}, seed=5)
    alone = bits(generate(served, [long])[0])
    assert bits(generate(served, [*random_asks(6), long], prefill_tokens=100)[6]) == alone


@pytest.mark.parametrize("name", ["qwen3-tied", "qwen3-wide", "llama"])
def test_in_bfloat16(model_path, name):
    served = load(model_path(name), torch.bfloat16)
    asks = random_asks(24)
    crowd = [bits(result) for result in generate(served, asks)]
    assert [bits(generate(served, [asks[number]])[0]) for number in (0, 11, 23)] == [crowd[n] for n in (0, 11, 23)]
