from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
from rollout_fakes import save_tokenizer, write_jsonl

from miles.core.errors import DataError
from miles.rollout.data import PromptFormat, open_dataset
from miles.rollout.text import ChatTokenizer, load_tokenizer


def test_several_files_follow_each_other(tmp_path: Path) -> None:
    a = write_jsonl(tmp_path / "a.jsonl", [{"input": "1"}, {"input": "2"}])
    b = write_jsonl(tmp_path / "b.jsonl", [{"input": "3"}, {"input": "4"}])
    dataset = open_dataset(f"{a},{b}@[1:]", PromptFormat())
    assert [dataset[index].text for index in range(len(dataset))] == ["1", "2", "4"]


def test_every_malformed_row_is_reported_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"input": "ok"}\n{"input": \n{"other": 1}\n{"input": "ok"}\n')
    with pytest.raises(DataError) as caught:
        open_dataset(str(path), PromptFormat())
    text = str(caught.value)
    assert text.startswith("2 malformed rows")
    assert f"{path}:2" in text
    assert f"{path}:3: --input-key 'input' is missing" in text


def test_the_report_of_malformed_rows_has_an_end(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{}] * 50)
    with pytest.raises(DataError, match=r"50 malformed rows(.|\n)*and 30 more"):
        open_dataset(str(path), PromptFormat())


def test_prompts_that_are_too_long_are_left_out_and_counted(
    tmp_path: Path, tokenizer: ChatTokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"input": "x" * length} for length in (3, 9, 4, 5)])
    with caplog.at_level(logging.WARNING):
        dataset = open_dataset(str(path), PromptFormat(), tokenizer, max_prompt_len=4)
    assert [dataset[index].text for index in range(len(dataset))] == ["xxx", "xxxx"]
    assert dataset.num_too_long == 2
    assert "left out 2 of 4 prompts, longer than --rollout-max-prompt-len 4" in caplog.text


def test_the_chat_template_counts_for_the_length(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"input": "x"}])
    with pytest.raises(DataError, match="all 1 prompts are longer than --rollout-max-prompt-len 4"):
        open_dataset(str(path), PromptFormat(apply_chat_template=True), tokenizer, max_prompt_len=4)


def test_a_file_without_rows_is_an_error(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [])
    with pytest.raises(DataError, match="no rows"):
        open_dataset(str(path), PromptFormat())


def test_a_row_that_the_template_refuses_is_named(tmp_path: Path) -> None:
    checkpoint = save_tokenizer(tmp_path / "t", "{{ raise_exception('roles must alternate') }}")
    path = write_jsonl(tmp_path / "a.jsonl", [{"input": "x"}])
    dataset = open_dataset(str(path), PromptFormat(apply_chat_template=True), load_tokenizer(str(checkpoint)))
    with pytest.raises(DataError, match=r"a\.jsonl:1: the chat template refuses the messages: roles must alternate"):
        dataset[0]


def test_orders_are_permutations_that_depend_on_seed_and_epoch_only(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"input": str(number)} for number in range(50)])
    dataset = open_dataset(str(path), PromptFormat())
    np.random.seed(0)
    first = dataset.order(7, 0)
    np.random.seed(1)
    assert (dataset.order(7, 0) == first).all()
    assert sorted(first) == list(range(50))
    assert (dataset.order(7, 1) != first).any()
