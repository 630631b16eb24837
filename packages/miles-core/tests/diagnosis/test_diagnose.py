"""Every cause, put into the samples of a run, is found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402

from miles.core.cli import main  # noqa: E402
from miles.core.diagnosis.diagnose import diagnose  # noqa: E402
from miles.core.diagnosis.scorer import Scorer, log_probs  # noqa: E402
from miles.core.diagnosis.verdict import Cause  # noqa: E402
from miles.core.errors import DataError  # noqa: E402
from miles.core.run_directory import RunDirectory  # noqa: E402

WORDS = [f"w{number}" for number in range(120)]
TEMPLATE = (
    "{% for m in messages %}<user> {{ m.content }} <end> {% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
MESSAGES = [{"role": "user", "content": "w1 w2 w3 w4"}]
TEMPERATURE = 0.8


def save_model(directory: Path, seed: int) -> Path:
    """A sharp little model whose words depend on what came before."""
    torch.manual_seed(seed)
    config = transformers.Qwen3Config(
        vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, initializer_range=0.35, tie_word_embeddings=True,
    )  # fmt: skip
    transformers.Qwen3ForCausalLM(config).save_pretrained(directory)
    vocabulary = {word: number for number, word in enumerate(["<bos>", "<user>", "<assistant>", "<end>", *WORDS])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<end>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<bos>", eos_token="<end>", chat_template=TEMPLATE
    )
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"), 0)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("trained"), 1)


def prompt_ids(directory: Path, **options: Any) -> list[int]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    text = tokenizer.apply_chat_template(MESSAGES, tokenize=False, **{"add_generation_prompt": True, **options})
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
    return ids


def sampled(
    served: Path,
    *,
    temperature: float = TEMPERATURE,
    top_k: int | None = None,
    seen: list[int] | None = None,
    dtype: Any = torch.float32,
    length: int = 40,
) -> tuple[list[int], list[float]]:
    """A response and its log-probabilities, from an engine that may be set up otherwise than the run says."""
    scorer = Scorer(served, dtype)
    prompt = prompt_ids(served) if seen is None else seen
    response: list[int] = []
    logps = []
    generator = torch.Generator().manual_seed(len(prompt))
    for _ in range(length):
        logits = scorer.logits([*prompt, *response], [0])
        if top_k is not None:
            logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
        token = int(torch.multinomial(torch.softmax(logits[0] / temperature, -1), 1, generator=generator))
        response.append(token)
        logps.append(float(log_probs(logits, [token], temperature)[0]))
    return response, logps


def make_run(
    directory: Path, checkpoint: Path, response: list[int], logps: list[float], *, rollout_id: int = 0, said: int = 0
) -> RunDirectory:
    run = RunDirectory(directory).create()
    flags = {"hf_checkpoint": str(checkpoint), "rollout_temperature": TEMPERATURE, "train_backend": "fsdp"}
    run.write_config(flags, dict.fromkeys(flags, "flag"))
    row = {
        "index": 0,
        "prompt": MESSAGES,
        "tokens": prompt_ids(checkpoint) + response,
        "response_length": len(response),
        "rollout_log_probs": logps,
        "weight_versions": [str(said)],
    }
    run.rollout_samples(rollout_id).write_text(json.dumps(row) + "\n")
    return run


def cause(run: RunDirectory, rollout_id: int = 0, **given: Path) -> Cause:
    weights = {int(name.removeprefix("v")): path for name, path in given.items()}
    return diagnose(run, rollout_id, weights).verdict.cause


def test_an_engine_that_does_as_it_is_told_agrees(tmp_path: Path, model: Path) -> None:
    assert cause(make_run(tmp_path, model, *sampled(model))) is Cause.AGREE


def test_another_temperature(tmp_path: Path, model: Path) -> None:
    found = diagnose(make_run(tmp_path, model, *sampled(model, temperature=1.0)), 0, {}).verdict
    assert found.cause is Cause.TEMPERATURE
    assert "temperature 1 instead of 0.8" in found.why


def test_log_probabilities_of_a_truncated_support(tmp_path: Path, model: Path) -> None:
    found = diagnose(make_run(tmp_path, model, *sampled(model, top_k=10)), 0, {}).verdict
    assert found.cause is Cause.TRUNCATION
    assert "top_k 10" in found.why


def test_weights_of_an_earlier_version(tmp_path: Path, model: Path, trained: Path) -> None:
    run = make_run(tmp_path, model, *sampled(model), rollout_id=3, said=3)
    found = diagnose(run, 3, {3: trained}).verdict
    assert found.cause is Cause.STALE_VERSION
    assert "weight version 0 instead of 3 (the engine said 3)" in found.why


@pytest.mark.parametrize("way", ["no generation prompt", "bos", "first token lost", "one token late"])
def test_another_prompt_or_place(tmp_path: Path, model: Path, way: str) -> None:
    ids = prompt_ids(model)
    seen = {
        "no generation prompt": prompt_ids(model, add_generation_prompt=False),
        "bos": [0, *ids],
        "first token lost": ids[1:],
    }
    response, logps = sampled(model, seen=seen.get(way))
    if way == "one token late":
        logps = [logps[-1], *logps[:-1]]
    assert cause(make_run(tmp_path, model, response, logps)) is Cause.TEMPLATE


def test_rounding(tmp_path: Path, model: Path) -> None:
    response, logps = sampled(model)
    found = sampled(model, dtype=torch.bfloat16)
    assert found[1] != logps
    assert cause(make_run(tmp_path / "a", model, *found)) is Cause.PRECISION
    noise = np.random.default_rng(0).normal(0, 0.01, len(logps))
    assert cause(make_run(tmp_path / "b", model, response, (logps + noise).tolist())) is Cause.PRECISION


def test_weights_that_are_nowhere(tmp_path: Path, model: Path, trained: Path) -> None:
    assert cause(make_run(tmp_path, model, *sampled(trained))) is Cause.WRONG_WEIGHTS


def test_answers_of_tools_do_not_count(tmp_path: Path, model: Path) -> None:
    response, logps = sampled(model)
    run = make_run(tmp_path, model, response, logps)
    row = json.loads(run.rollout_samples(0).read_text())
    row["rollout_log_probs"][5:9] = [0.0] * 4
    row["loss_mask"] = [1] * 5 + [0] * 4 + [1] * (len(response) - 9)
    run.rollout_samples(0).write_text(json.dumps(row) + "\n")
    found = diagnose(run, 0, {})
    assert (found.verdict.cause, found.num_tokens) == (Cause.AGREE, len(response) - 4)


def test_the_command_prints_the_verdict(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path, model, *sampled(model, temperature=1.0))
    assert main(["diagnose", str(tmp_path)]) == 1
    text = capsys.readouterr().out
    assert text.startswith("rollout 0: 40 sampled tokens of 1 samples\nverdict: temperature\n")


def test_what_is_missing_is_told(tmp_path: Path, model: Path) -> None:
    run = make_run(tmp_path / "run", model, *sampled(model, length=3), rollout_id=4)
    with pytest.raises(DataError, match=r"weights of the versions \[0\] and samples of the rollouts \[4\]"):
        diagnose(run, None, {})
    with pytest.raises(DataError, match="--weights 4=DIR"):
        diagnose(run, 4, {})
    with pytest.raises(DataError, match=r"--rollout 9: its samples are not there; there are \[4\]"):
        diagnose(run, 9, {})
    with pytest.raises(DataError, match=r"no config\.json"):
        diagnose(RunDirectory(tmp_path / "nothing"), None, {})
    assert main(["diagnose", str(tmp_path / "run"), "--weights", "4"]) == 2
