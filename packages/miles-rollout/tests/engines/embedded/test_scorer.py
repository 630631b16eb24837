"""The engine in another process gives the bits that it gave while it generated."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from engine_models import Ask, generate, load, random_asks

from miles.core.config import Config
from miles.core.errors import EngineError
from miles.core.registry import Registry
from miles.core.weights.adapter_form import AdapterForm
from miles.rollout.engines.embedded.adapters import Adapters
from miles.rollout.engines.embedded.scorer import EmbeddedScorer


def scorer_of(path, **flags) -> EmbeddedScorer:
    return EmbeddedScorer(Config.of(hf_checkpoint=str(path), rollout_num_engines=1, engine_num_threads=1, **flags))


def scored(scorer, asks, results):
    tokens = [np.asarray(ask.prompt + result.tokens) for ask, result in zip(asks, results, strict=True)]
    return scorer.score(tokens, [len(result.tokens) for result in results])


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("name", ["qwen3-tied", "llama", "qwen3-moe"])
def test_scores_are_the_engines_own_to_the_bit(model_path, name, temperature):
    asks = random_asks(12)
    for ask in asks:
        ask.params["temperature"] = temperature
    results = generate(load(model_path(name)), asks)
    scores = scored(scorer_of(model_path(name), rollout_temperature=temperature), asks, results)
    for result, score in zip(results, scores, strict=True):
        assert score.tolist() == np.asarray(result.logps, np.float32).tolist()


def test_scores_follow_the_weights(model_path):
    path, asks = model_path("qwen3-tied"), [Ask([5, 6, 7], {"max_new_tokens": 9}, seed=3)]
    engine, scorer = load(path), scorer_of(path)
    changed = {name: engine.weights.read(name) * 1.01 for name in engine.weights.names()}
    for name, tensor in changed.items():
        engine.weights.write(name, tensor)
    results = generate(engine, asks)
    (before,) = scored(scorer, asks, results)
    scorer.take((name, tensor.requires_grad_()) for name, tensor in changed.items())
    (after,) = scored(scorer, asks, results)
    assert before.tolist() != after.tolist() == np.asarray(results[0].logps, np.float32).tolist()


def test_scores_follow_an_adapter(model_path):
    path, asks = model_path("qwen3-tied"), [Ask([5, 6, 7], {"max_new_tokens": 9}, seed=3)]
    engine, scorer = load(path), scorer_of(path)
    form = AdapterForm(2, 4.0, tuple(scorer.facts()["adapters"]["layers"]))
    Adapters(engine.adapter_places, engine.weights, path).expect(form)
    tensors = {name: torch.randn(engine.weights.read(name).shape) * 0.1 for name in form.names()}
    engine.weights.take(tensors.items())
    results = generate(engine, asks)
    scorer.take(tensors.items(), form)
    (found,) = scored(scorer, asks, results)
    assert found.tolist() == np.asarray(results[0].logps, np.float32).tolist()


def test_threads_are_the_engines_while_it_scores(model_path):
    torch.set_num_threads(2)
    asks = [Ask([5, 6, 7], {"max_new_tokens": 2}, seed=3)]
    scored(scorer_of(model_path("qwen3-tied")), asks, generate(load(model_path("qwen3-tied")), asks))
    assert torch.get_num_threads() == 2


def test_a_sample_that_does_not_fit_is_refused(model_path, monkeypatch):
    monkeypatch.setattr("miles.rollout.engines.embedded.scorer.available_memory", lambda: 1 << 14)
    with pytest.raises(EngineError, match="a sample of 9 tokens does not fit"):
        scorer_of(model_path("qwen3-tied")).score([np.arange(9)], [3])


def test_samples_are_as_long_as_engines_take_them(model_path):
    scorer = scorer_of(model_path("qwen3-tied"), rollout_max_context_len=8)
    with pytest.raises(EngineError, match="takes 8 tokens of context"):
        scorer.score([np.arange(40)], [3])


def test_it_is_found_by_the_name_of_its_engine():
    assert Registry("miles.engine_scorers").get("embedded") is EmbeddedScorer


def test_a_model_whose_rows_depend_on_each_other_is_refused(model_path, monkeypatch):
    monkeypatch.setattr("miles.rollout.engines.embedded.model_fast.FastModel.batch_invariant", False)
    with pytest.raises(EngineError, match="--true-on-policy-mode"):
        scorer_of(model_path("qwen3-tied"))
