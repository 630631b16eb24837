from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from miles.core.config import Config
from miles.core.errors import ConfigError
from miles.rollout.eval_datasets import check_eval_datasets, eval_datasets


def from_yaml(tmp_path: Path, text: str, **values: Any) -> Config:
    path = tmp_path / "eval.yaml"
    path.write_text(text)
    return Config.of(eval_config=str(path), eval_interval=1, **values)


def test_pairs_inherit_the_rollouts_settings() -> None:
    config = Config.of(
        eval_prompt_data=["a", "a.jsonl", "b", "b.jsonl"],
        rollout_temperature=0.7,
        rollout_max_response_len=9,
        eval_top_p=0.5,
        label_key="answer",
        n_samples_per_eval_prompt=4,
    )
    first, second = eval_datasets(config)
    assert (first.name, first.path, second.name) == ("a", "a.jsonl", "b")
    assert (first.settings.temperature, first.settings.top_p, first.settings.max_response_len) == (0.7, 0.5, 9)
    assert (first.form.label_key, first.num_samples) == ("answer", 4)


def test_a_single_path_is_called_aime() -> None:
    assert eval_datasets(Config.of(eval_prompt_data=["x.jsonl"]))[0].name == "aime"


def test_the_file_wins_and_resolves_data_set_then_defaults_then_flags(tmp_path: Path) -> None:
    config = from_yaml(
        tmp_path,
        """
        eval:
          defaults: {temperature: 0, n_samples_per_eval_prompt: 2, rm_type: f1}
          datasets:
            - {name: a, path: a.jsonl, temperature: 0.3, metadata_overrides: {k: 1}, stop: END, min_new_tokens: 3}
            - {name: b, path: b.jsonl, rm_type: math}
        """,
        eval_prompt_data=["ignored", "x"],
        eval_top_k=5,
    )
    a, b = eval_datasets(config)
    assert (a.settings.temperature, b.settings.temperature) == (0.3, 0.0)
    assert (a.rm_type, b.rm_type, a.num_samples) == ("f1", "math", 2)
    assert a.metadata_overrides == {"k": 1}
    assert a.settings.params() | {"stop": ["END"], "min_new_tokens": 3, "top_k": 5} == a.settings.params()


def test_data_sets_may_be_a_mapping(tmp_path: Path) -> None:
    config = from_yaml(tmp_path, "datasets: {a: {path: a.jsonl}, b: {path: b.jsonl}}")
    assert [spec.name for spec in eval_datasets(config)] == ["a", "b"]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("- 1", "expected a mapping with 'datasets'"),
        ("datasets: []", "'datasets' is missing or empty"),
        ("datasets: [{name: a}]", "expected a mapping with a 'name' and a 'path'"),
        ("datasets: [{name: a, path: p, temprature: 1}]", "unknown setting 'temprature'; did you mean 'temperature'?"),
        ("datasets: [{name: a, path: p, top_k: x}]", "top_k must be int, found 'x'"),
        ("defaults: 3\ndatasets: {a: {path: p}}", "defaults: expected a mapping, found int"),
        ("dataset: []", "unknown"),
        ("datasets: [{name: a, path: p}, {name: a, path: q}]", "'a' is named twice"),
        ("{", "cannot be read"),
    ],
)
def test_mistakes_in_the_file_are_explained(tmp_path: Path, text: str, complaint: str) -> None:
    config = from_yaml(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        eval_datasets(config)
    assert complaint in str(caught.value)
    assert any(complaint in problem for problem in check_eval_datasets(config))


def test_an_odd_number_of_values_is_refused() -> None:
    config = Config.of(eval_prompt_data=["a", "b", "c"])
    assert check_eval_datasets(config) == [
        "--eval-prompt-data a b c: expected pairs of a name and a path, found 3 values"
    ]


def test_an_interval_needs_data() -> None:
    assert "nothing to evaluate on" in check_eval_datasets(Config.of(eval_interval=2))[0]
    assert check_eval_datasets(Config.of()) == []
