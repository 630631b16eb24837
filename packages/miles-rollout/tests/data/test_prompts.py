from __future__ import annotations

from typing import Any

import pytest

from miles.rollout.data import PromptFormat
from miles.rollout.text import ChatTokenizer

FORM = PromptFormat(label_key="answer")


def test_a_row_gives_prompt_label_metadata_and_tools() -> None:
    prompt = FORM.read({"input": "hi", "answer": 7, "metadata": {"k": 1}, "tools": '[{"type": "function"}]'})
    assert (prompt.text, prompt.label) == ("hi", 7)
    assert prompt.metadata == {"k": 1, "tools": [{"type": "function"}]}


def test_reading_does_not_change_the_row() -> None:
    row: dict[str, Any] = {"input": "hi", "answer": 7, "metadata": {"k": 1}, "tools": []}
    FORM.read(row)
    assert row["metadata"] == {"k": 1}


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ({"answer": 1}, r"--input-key 'input' is missing; the row has \['answer'\]"),
        ({"input": "x"}, "--label-key 'answer' is missing"),
        ({"input": 3, "answer": 1}, "must be text or a list of messages: found int"),
        ({"input": [], "answer": 1}, "the list is empty"),
        ({"input": [{"content": "x"}], "answer": 1}, "message 1 has no 'role'"),
        ({"input": [{"role": "user"}], "answer": 1}, "message 1 has no 'content'"),
        ({"input": ["hi"], "answer": 1}, "message 1 is str, expected an object"),
        ({"input": "x", "answer": 1, "metadata": [1]}, "--metadata-key 'metadata' must hold an object, found list"),
        ({"input": "x", "answer": 1, "metadata": "{"}, "'metadata' is text that is not JSON"),
        ({"input": "x", "answer": 1, "tools": {}}, "--tool-key 'tools' must hold a list of tools, found dict"),
    ],
)
def test_what_is_wrong_with_a_row_is_said(row: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        FORM.read(row)


def test_text_becomes_a_user_message_for_the_chat_template(tokenizer: ChatTokenizer) -> None:
    form = PromptFormat(apply_chat_template=True)
    prompt = form.render(form.read({"input": "hi"}), tokenizer)
    assert prompt.text == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


def test_messages_stay_messages_without_the_template(tokenizer: ChatTokenizer) -> None:
    messages = [{"role": "user", "content": "hi"}]
    form = PromptFormat()
    assert form.render(form.read({"input": messages}), tokenizer).text == messages


def test_arguments_of_the_template_are_passed_on(tmp_path_factory: pytest.TempPathFactory) -> None:
    from rollout_fakes import save_tokenizer

    from miles.rollout.text import load_tokenizer

    template = "{{ messages[0]['content'] }}{% if loud %}!{% endif %}{% if tools %}{{ tools | length }}{% endif %}"
    path = save_tokenizer(tmp_path_factory.mktemp("loud"), template)
    form = PromptFormat(apply_chat_template=True, chat_template_kwargs={"loud": True})
    prompt = form.render(form.read({"input": "hi", "tools": [{}, {}]}), load_tokenizer(str(path)))
    assert prompt.text == "hi!2"
