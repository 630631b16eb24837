"""Chat templates are rendered as transformers renders them, and mistakes are named."""

from __future__ import annotations

import json

import pytest
from chat_templates import FAMILIES

from miles.core.continuation import TemplateRefusalError
from miles.core.errors import ConfigError
from miles.router.sessions.template import ChatTemplate
from miles.router.tokenizer import CheckpointTokenizer

TOOLS = [{"type": "function", "function": {"name": "add", "description": "a < b & ä", "parameters": {}}}]
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": "ü"}}}


@pytest.fixture
def with_template(tmp_path, checkpoint):
    def make(source, **variables):
        path = tmp_path / "own.jinja"
        path.write_text(source)
        return ChatTemplate(CheckpointTokenizer(checkpoint("chatml")), path, variables)

    return make


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_it_writes_what_transformers_writes(family, checkpoint, template):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(checkpoint(family))
    ours = template(family)
    messages = [{"role": "user", "content": " hi <b> "}, {"role": "assistant", "content": "yes"}]
    more = [*messages, {"role": "user", "content": "a\nb"}]
    conversations = [messages[:1], messages, more]
    if family in ("chatml", "qwen3", "llama3", "glm"):
        calling = {"role": "assistant", "content": "", "tool_calls": [CALL]}
        conversations.append([{"role": "system", "content": "S"}, *more, calling, {"role": "tool", "content": "3"}])
    for conversation in conversations:
        for prompt in (False, True):
            for tools in (None, TOOLS):
                text = theirs.apply_chat_template(
                    conversation, tools=tools, tokenize=False, add_generation_prompt=prompt
                )
                assert ours.render(conversation, tools=tools, prompt=prompt) == text
                assert ours.tokenizer.encode(text) == theirs.encode(text, add_special_tokens=False)


def test_blocks_marked_as_generated_are_written_like_others(with_template):
    template = with_template("a{% generation %}b{{ messages | length }}{% endgeneration %}c")
    assert template.render([{}], prompt=False) == "ab1c"


def test_variables_reach_the_template(with_template):
    template = with_template(
        "{{ x }}{{ y }}{{ strftime_now('%Y') | length }}{% for i in [1, 2] %}{% break %}{% endfor %}", x=1
    )
    assert template.render([], prompt=False, variables={"y": 2}) == "124"


def test_what_a_template_refuses_is_told(with_template):
    with pytest.raises(TemplateRefusalError, match="not so"):
        with_template("{{ raise_exception('not so') }}").render([], prompt=False)
    with pytest.raises(TemplateRefusalError, match="refuses the messages"):
        with_template("{{ messages[0].content + 1 }}").render([{"content": "a"}], prompt=False)


def test_template_cannot_reach_into_python(with_template):
    with pytest.raises(TemplateRefusalError):
        with_template("{{ ''.__class__.__mro__ }}").render([], prompt=False)


def configure(directory, **settings):
    (directory / "chat_template.jinja").unlink(missing_ok=True)
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return CheckpointTokenizer(directory)


@pytest.fixture
def folder(tmp_path):
    from chat_templates import write_checkpoint

    return write_checkpoint(tmp_path / "own", "chatml")


def test_template_in_the_settings_is_found(folder):
    template = ChatTemplate(configure(folder, chat_template="one"), None, {})
    assert template.render([], prompt=True) == "one"


def test_template_for_tools_is_taken_for_tools(folder):
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
    template = ChatTemplate(configure(folder, chat_template=named), None, {})
    assert template.render([], prompt=True) == "plain"
    assert template.render([], prompt=True, tools=TOOLS) == "tools"
    assert template.source == "tools"


@pytest.mark.parametrize("settings", [{}, {"chat_template": [{"name": "x", "template": "y"}]}])
def test_checkpoint_without_a_template_is_named(folder, settings):
    with pytest.raises(ConfigError, match="--session-chat-template FILE"):
        ChatTemplate(configure(folder, **settings), None, {})


def test_template_that_is_no_template_is_named(with_template):
    with pytest.raises(ConfigError, match="cannot be read"):
        with_template("{% if %}")


def test_template_file_that_is_missing_is_named(tmp_path, checkpoint):
    with pytest.raises(ConfigError, match="No such file"):
        ChatTemplate(CheckpointTokenizer(checkpoint("chatml")), tmp_path / "none.jinja", {})
