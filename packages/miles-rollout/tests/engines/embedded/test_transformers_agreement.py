"""Greedy output and log-probabilities are those of transformers."""

import pytest
import torch
from engine_models import EOS, FAST, GENERAL, Ask, generate, load, random_asks
from transformers import AutoModelForCausalLM

from miles.rollout.engines.embedded.model import Checkpoint, load_model

LENGTH = 160  # longer than a span of attention


def reference(path, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, experts_implementation="eager").eval()


@torch.no_grad()
def own_choices(reference, prompt, tokens):
    """The likeliest token after the prompt, and after each of ``tokens`` but the last: one pass instead of many."""
    logits = reference(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
    return logits.argmax(-1).tolist()


@torch.no_grad()
def own_log_probs(reference, prompt, tokens, temperature=1.0):
    logits = reference(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
    return torch.log_softmax(logits / temperature, -1).gather(1, torch.tensor(tokens)[:, None])[:, 0]


@pytest.mark.parametrize("name", [*FAST, *GENERAL])
def test_greedy_output(model, model_path, name):
    own = reference(model_path(name))
    prompts = [[7], list(range(3, 40)), [9, 8, 7, 6, 5]]
    params = {"max_new_tokens": LENGTH, "temperature": 0.0}
    results = generate(model(name), [Ask(prompt, params, stop_ids=(EOS,)) for prompt in prompts])
    for prompt, result in zip(prompts, results, strict=True):
        assert result.tokens == own_choices(own, prompt, result.tokens)
        assert len(result.tokens) == LENGTH or result.tokens[-1] == EOS


@pytest.mark.parametrize("name", [*FAST, *GENERAL])
def test_log_probs_of_sampled_tokens(model, model_path, name):
    """Within 1e-5, and what transformers itself is off from the exact value."""
    own, exact = reference(model_path(name)), reference(model_path(name), torch.float64)
    asks = random_asks(12, longest_output=LENGTH)
    for ask, result in zip(asks, generate(model(name), asks), strict=True):
        expected, true = (
            own_log_probs(net, ask.prompt, result.tokens, ask.params["temperature"] or 1.0) for net in (own, exact)
        )
        assert ((torch.tensor(result.logps) - expected).abs() <= 1e-5 + (expected - true).abs()).all()


@pytest.mark.parametrize("name", ["qwen3-tied", "qwen2", "llama3-biased"])
def test_the_general_layer_agrees_with_the_fast_one(model, model_path, name):
    general = load(model_path(name), kind="general")
    assert (model(name).kind, general.kind) == ("fast", "general")
    asks = random_asks(8)
    for fast, slow in zip(generate(model(name), asks), generate(general, asks), strict=True):
        assert fast.tokens == slow.tokens
        torch.testing.assert_close(torch.tensor(fast.logps), torch.tensor(slow.logps), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["qwen3-tied", "gpt-neox"])
def test_bfloat16_log_probs_are_close(model_path, name):
    own = reference(model_path(name))
    served = load_model(Checkpoint.open(str(model_path(name))), torch.bfloat16)
    result = generate(served, [Ask([3, 4, 5, 6], {"max_new_tokens": LENGTH}, seed=1)])[0]
    expected = own_log_probs(own, [3, 4, 5, 6], result.tokens)
    assert (torch.tensor(result.logps) - expected).abs().mean() < 0.1
