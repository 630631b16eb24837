"""The tokens after a tool call are those that each family's template writes."""

from __future__ import annotations

from pathlib import Path

import pytest
from rollout_fakes import save_tokenizer

from miles.core.errors import ConfigError
from miles.core.protocols.tools import ToolCall
from miles.rollout.text import ChatTokenizer, load_tokenizer
from miles.rollout.tools.continuation import Continuation

# Each family's way to write turns, calls and answers, in brief.
QWEN = (
    "{% for m in messages %}{% if m.role == 'tool' %}"
    "{% if messages[loop.index0 - 1].role != 'tool' %}{{ '<|im_start|>user' }}{% endif %}"
    "{{ '\n<tool_response>\n' + m.content + '\n</tool_response>' }}"
    "{% if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{ '<|im_end|>\n' }}{% endif %}"
    "{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content }}{% for c in m.tool_calls or [] %}"
    '{{ \'\n<tool_call>\n{"name": "\' + c.function.name + \'", "arguments": \' }}{{ c.function.arguments | tojson }}'
    "{{ '}\n</tool_call>' }}{% endfor %}{{ '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA = (
    "{% for m in messages %}{{ '<|start_header_id|>' + ('ipython' if m.role == 'tool' else m.role) }}"
    "{{ '<|end_header_id|>\n\n' }}{% if m.tool_calls %}{{ '{\"name\": \"' + m.tool_calls[0].function.name }}"
    "{{ '\", \"parameters\": ' }}{{ m.tool_calls[0].function.arguments | tojson }}{{ '}' }}"
    "{% else %}{{ m.content }}{% endif %}{{ '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
GLM = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ '<|user|>\n' + m.content }}"
    "{% elif m.role == 'assistant' %}{{ '<|assistant|>\n' + m.content }}{% for c in m.tool_calls or [] %}"
    "{{ '\n<tool_call>' + c.function.name + '\n</tool_call>' }}{% endfor %}"
    "{% else %}{{ '<|observation|>\n<tool_response>\n' + m.content + '\n</tool_response>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
MISTRAL = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + '[/INST]' }}"
    "{% elif m.role == 'assistant' %}{% if m.tool_calls %}{{ '[TOOL_CALLS] [' }}{% for c in m.tool_calls %}"
    "{{ '{\"name\": \"' + c.function.name + '\", \"id\": \"' + c.id + '\"}' }}{% endfor %}{{ ']' }}"
    "{% else %}{{ ' ' + m.content }}{% endif %}{{ '</s>' }}"
    "{% else %}{{ '[TOOL_RESULTS] {\"content\": ' + m.content + ', \"call_id\": \"' + m.tool_call_id + '\"}' }}"
    "{{ '[/TOOL_RESULTS]' }}{% endif %}{% endfor %}"
)
REFUSES = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "{{ m.content }}{% endfor %}"
)
COUNTS = "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"

SPECIALS = {
    QWEN: ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    LLAMA: ["<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>"],
    GLM: ["<|user|>", "<|assistant|>", "<|observation|>", "<|endoftext|>"],
    MISTRAL: ["<s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "</s>"],
}
CALLS = (ToolCall("add", {"a": 1}),)


def tokenizer_of(directory: Path, template: str) -> ChatTokenizer:
    specials = SPECIALS.get(template, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    return load_tokenizer(str(save_tokenizer(directory, template, specials)))


@pytest.mark.parametrize(
    ("template", "sampled", "expected"),
    [
        (
            QWEN,
            "x</tool_call><|im_end|>",
            "\n<|im_start|>user\n<tool_response>\n7\n</tool_response><|im_end|>\n<|im_start|>assistant\n",
        ),
        (
            QWEN,  # a stop string ended the turn
            "x</tool_call>",
            "<|im_end|>\n<|im_start|>user\n<tool_response>\n7\n</tool_response><|im_end|>\n<|im_start|>assistant\n",
        ),
        (
            QWEN,  # the turn ended with another special token, which stays
            "x<|endoftext|>",
            "\n<|im_start|>user\n<tool_response>\n7\n</tool_response><|im_end|>\n<|im_start|>assistant\n",
        ),
        (
            LLAMA,
            "x<|eom_id|>",
            "<|start_header_id|>ipython<|end_header_id|>\n\n7<|eot_id|><|start_header_id|>assistant<|end_header_id|>"
            "\n\n",
        ),
        (
            LLAMA,
            "x<|eot_id|>",
            "<|start_header_id|>ipython<|end_header_id|>\n\n7<|eot_id|><|start_header_id|>assistant<|end_header_id|>"
            "\n\n",
        ),
        (GLM, "x</tool_call><|observation|>", "\n<tool_response>\n7\n</tool_response><|assistant|>"),
        (GLM, "x</tool_call>", "<|observation|>\n<tool_response>\n7\n</tool_response><|assistant|>"),
        (MISTRAL, "x</s>", '[TOOL_RESULTS] {"content": 7, "call_id": "call00000"}[/TOOL_RESULTS]'),
    ],
)
def test_what_follows_a_call(tmp_path: Path, template: str, sampled: str, expected: str) -> None:
    text = tokenizer_of(tmp_path, template)
    added = Continuation(text, {}).tool_answers(text.encode(sampled), CALLS, ["7"])
    assert text.hf.decode(added) == expected


def test_answers_of_several_calls(tmp_path: Path) -> None:
    text = tokenizer_of(tmp_path, QWEN)
    added = Continuation(text, {}).tool_answers(text.encode("x<|im_end|>"), CALLS * 2, ["7", "8"])
    assert text.hf.decode(added).count("<tool_response>") == 2


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        (REFUSES, "no tools"),
        ("{% for m in messages %}{{ m.role }}{% endfor %}", "leaves out what the assistant says"),
        (COUNTS, "differently when messages follow"),
    ],
)
def test_templates_that_cannot_be_used_are_refused_at_once(tmp_path: Path, template: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        Continuation(tokenizer_of(tmp_path, template), {})
