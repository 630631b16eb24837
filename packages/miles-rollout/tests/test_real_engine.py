"""The rollout role over the embedded engine and the router, as a run starts them."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rollout_fakes import FakeRewards, save_tokenizer, write_jsonl

from miles.core.config import Config
from miles.core.errors import EngineError
from miles.core.types.batch import RolloutBatch
from miles.core.types.rollout import DynamicFilterOutput
from miles.core.types.sample import Group
from miles.rollout import manager as manager_module
from miles.rollout.manager import RolloutManager

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]

Make = Callable[..., RolloutManager]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3 with random weights that generates any of 64 tokens."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("miles.router")
    from transformers import Qwen3Config, Qwen3ForCausalLM

    path = save_tokenizer(tmp_path_factory.mktemp("model"))
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=259,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size=64,
        tie_word_embeddings=True,
        initializer_range=0.2,
        eos_token_id=258,
    )
    Qwen3ForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def start(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Make]:
    started: list[RolloutManager] = []
    rewards = FakeRewards(lambda sample: float(sample.tokens[-1] % 2))
    prompts = write_jsonl(tmp_path_factory.mktemp("data") / "p.jsonl", [{"input": f"p{n}"} for n in range(40)])

    class Dispatchers:
        def get(self, name: str) -> Any:
            return lambda config: rewards

    def start(**values: Any) -> RolloutManager:
        given = {
            "hf_checkpoint": str(model),
            "prompt_data": str(prompts),
            "device": "cpu",
            "engine_num_threads": 1,
            "rollout_batch_size": 8,
            "n_samples_per_prompt": 4,
            "rollout_max_response_len": 24,
            **values,
        }
        role = RolloutManager(Config.of(**given), tmp_path_factory.mktemp("run"))
        started.append(role)
        role.launch()
        role.wait_ready()
        return role

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(manager_module, "DISPATCHERS", Dispatchers())
        yield start
        for role in started:
            role.stop()


@pytest.fixture(scope="module")
def batch(start: Make) -> RolloutBatch:
    """The first rollout with one engine."""
    return start().generate(0).batch


def test_log_probs_are_the_models(batch: RolloutBatch, model: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(model)
    assert batch.rollout_log_probs is not None
    for tokens, length, found in zip(batch.tokens, batch.response_lengths, batch.rollout_log_probs, strict=True):
        with torch.no_grad():
            logits = reference(torch.as_tensor(tokens)[None]).logits[0, -length - 1 : -1]
        expected = torch.log_softmax(logits.float(), -1)
        picked = expected[torch.arange(length), torch.as_tensor(tokens[-length:])]
        assert torch.allclose(picked, torch.as_tensor(found), atol=1e-4)


def test_results_do_not_depend_on_how_many_engines_there_are(batch: RolloutBatch, start: Make) -> None:
    several = start(rollout_num_engines=3).generate(0).batch
    assert [tokens.tolist() for tokens in several.tokens] == [tokens.tolist() for tokens in batch.tokens]
    assert several.rollout_log_probs is not None
    assert batch.rollout_log_probs is not None
    for ours, theirs in zip(several.rollout_log_probs, batch.rollout_log_probs, strict=True):
        assert ours.tolist() == theirs.tolist()


def drop_two_thirds(args: Any, samples: Group) -> DynamicFilterOutput:
    return DynamicFilterOutput((samples[0].group_index or 0) % 3 == 0, "by number")


def test_surplus_is_aborted_in_the_engine(start: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rollout_fakes.drop_two_thirds", drop_two_thirds, raising=False)
    role = start(
        dynamic_sampling_filter_path="rollout_fakes.drop_two_thirds",
        over_sampling_batch_size=12,
        rollout_max_response_len=200,
        rollout_batch_size=4,
    )
    first, second = role.generate(0), role.generate(1)
    assert first.batch.group_indices[::4] == (0, 3, 6, 9)
    assert second.batch.group_indices[::4] == (12, 15, 18, 21)
    assert first.metrics["rollout/dynamic_filter/drop_by number"] == 6


def test_a_partial_rollout_goes_on_where_it_was_cut(start: Make) -> None:
    role = start(partial_rollout=True, over_sampling_batch_size=12, rollout_batch_size=4, rollout_max_response_len=400)
    role.generate(0)
    buffered = {sample.index: list(sample.tokens) for group in role._source.buffer for sample in group}  # type: ignore[union-attr]
    assert len(buffered) == 8 * 4
    for rollout_id in (1, 2):
        batch = role.generate(rollout_id).batch
        for index, tokens in zip(batch.sample_indices, batch.tokens, strict=True):
            cut = buffered.get(index)
            assert cut is None or tokens[: len(cut)].tolist() == cut


def test_a_killed_engine_ends_the_rollout_soon(start: Make) -> None:
    role = start(rollout_max_response_len=4000)
    pid = role._servers._engines[0].process.pid  # type: ignore[attr-defined]
    threading.Timer(0.3, os.kill, (pid, 9)).start()
    begin = time.monotonic()
    with pytest.raises(EngineError, match="has ended"):
        role.generate(0)
    assert time.monotonic() - begin < 60
