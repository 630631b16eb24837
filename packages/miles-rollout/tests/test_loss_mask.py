from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from rollout_fakes import CHATML, SPECIAL, save_tokenizer

from miles.rollout.loss_mask import LossMasks, MaskType
from miles.rollout.text import ChatTokenizer, load_tokenizer

USER, ASSISTANT, SYSTEM = "user", "assistant", "system"

THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""Writes an empty thought into the last message if an assistant wrote it, as Qwen3's template does."""

DEFAULT_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nBe good.<|im_end|>\n' }}{% endif %}" + CHATML
)


def talk(*turns: tuple[str, str]) -> list[dict[str, Any]]:
    return [{"role": role, "content": content} for role, content in turns]


def trained(
    tokenizer: ChatTokenizer, kind: MaskType, messages: list[dict[str, Any]], tools: Any = None
) -> tuple[str, list[str]]:
    """The whole text, and the stretches of it that train."""
    ids, mask = LossMasks(tokenizer, kind)([(messages, tools)])[0]
    assert len(ids) == len(mask)
    stretches: list[list[int]] = []
    previous = 0
    for token, trains in zip(ids, mask, strict=True):
        if trains and not previous:
            stretches.append([])
        if trains:
            stretches[-1].append(token)
        previous = trains
    return tokenizer.hf.decode(ids), [tokenizer.hf.decode(stretch) for stretch in stretches]


def with_template(tmp_path: Path, template: str, specials: tuple[str, ...] = tuple(SPECIAL)) -> ChatTokenizer:
    return load_tokenizer(str(save_tokenizer(tmp_path / "tokenizer", template, specials)))


@pytest.mark.parametrize("kind", ["qwen", "qwen3"])
def test_every_answer_trains_with_its_end(tokenizer: ChatTokenizer, kind: MaskType) -> None:
    messages = talk((SYSTEM, "s"), (USER, "a"), (ASSISTANT, "b c"), (USER, "d"), (ASSISTANT, "e"))
    text, parts = trained(tokenizer, kind, messages)
    assert text == tokenizer.render(messages, add_generation_prompt=False)
    assert parts == ["b c<|im_end|>\n", "e<|im_end|>\n"]


@pytest.mark.parametrize("kind", ["qwen", "qwen3"])
def test_a_message_can_be_left_out_of_training(tokenizer: ChatTokenizer, kind: MaskType) -> None:
    messages = talk((USER, "a"), (ASSISTANT, "b"), (USER, "c"), (ASSISTANT, "d"))
    messages[1]["step_loss_mask"] = 0
    assert trained(tokenizer, kind, messages)[1] == ["d<|im_end|>\n"]


@pytest.mark.parametrize("kind", ["qwen", "qwen3"])
def test_a_system_message_of_the_template_appears_once(tmp_path: Path, kind: MaskType) -> None:
    tokenizer = with_template(tmp_path, DEFAULT_SYSTEM)
    messages = talk((USER, "a"), (ASSISTANT, "b"), (USER, "c"), (ASSISTANT, "d"))
    text, parts = trained(tokenizer, kind, messages)
    assert text == tokenizer.render(messages, add_generation_prompt=False)
    assert parts == ["b<|im_end|>\n", "d<|im_end|>\n"]


def test_qwen3_writes_earlier_answers_without_the_thought_of_a_last_one(tmp_path: Path) -> None:
    tokenizer = with_template(tmp_path, THINKING)
    messages = talk((USER, "a"), (ASSISTANT, "b"), (USER, "c"))
    text, parts = trained(tokenizer, "qwen3", talk((USER, "a"), (ASSISTANT, "b")))
    assert parts == ["<think>\n\n</think>\n\nb<|im_end|>\n"]
    assert text == tokenizer.render(messages[:2], add_generation_prompt=False)


def test_distill_qwen_trains_the_last_answer_alone(tokenizer: ChatTokenizer) -> None:
    text, parts = trained(tokenizer, "distill_qwen", talk((USER, "a"), (ASSISTANT, "b")))
    assert text == "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb"
    assert parts == ["b"]


def test_a_tokenizer_that_knows_the_distilled_role_takes_its_kind(tmp_path: Path) -> None:
    tokenizer = with_template(tmp_path, CHATML, (*SPECIAL[:2], "<｜Assistant｜>", "<|im_end|>"))
    assert trained(tokenizer, "qwen", talk((USER, "a"), (ASSISTANT, "b")))[1] == ["b"]


def test_tools_are_written_once_before_the_first_message(tmp_path: Path) -> None:
    template = "{% if tools %}{{ 'TOOLS:' + (tools | length | string) + '\n' }}{% endif %}" + CHATML
    tokenizer = with_template(tmp_path, template)
    messages = talk((USER, "a"), (ASSISTANT, "b"))
    text, parts = trained(tokenizer, "qwen", messages, tools=[{}, {}])
    assert text == tokenizer.render(messages, tools=[{}, {}], add_generation_prompt=False)
    assert parts == ["b<|im_end|>\n"]


def test_a_template_that_cannot_be_taken_apart_is_refused(tmp_path: Path) -> None:
    tokenizer = with_template(tmp_path, "{{ messages | length }}:{{ messages[-1]['content'] }}")
    with pytest.raises(ValueError, match="try another --loss-mask-type"):
        LossMasks(tokenizer, "qwen3")([(talk((USER, "a"), (ASSISTANT, "b")), None)])


def test_many_conversations_are_done_at_once(tokenizer: ChatTokenizer) -> None:
    conversations: list[Any] = [(talk((USER, str(n)), (ASSISTANT, "x" * n)), None) for n in range(1, 6)]
    masks = LossMasks(tokenizer, "qwen")
    assert masks(conversations) == [masks([one])[0] for one in conversations]
