"""Token ids of new messages alone lead to the ids of the whole conversation, in every family of templates."""

from __future__ import annotations

import pytest
from chat_templates import END_TOKENS, FAMILIES
from hypothesis import given, settings
from hypothesis import strategies as st

from miles.core.continuation import Continuation, TemplateRefusalError
from miles.router.sessions.template import ChatTemplate
from miles.router.tokenizer import CheckpointTokenizer

WORDS = st.text(st.sampled_from("abc the\n<|é日"), min_size=1, max_size=12).filter(lambda text: text == text.strip())


def user(text):
    return {"role": "user", "content": text}


def said(text):
    return {"role": "assistant", "content": text}


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    from chat_templates import write_checkpoint

    folder = tmp_path_factory.mktemp("families")
    made = {}
    for family in FAMILIES:
        template = ChatTemplate(CheckpointTokenizer(write_checkpoint(folder / family, family)), None, {})
        made[family] = (template, Continuation(template))
    return made


def conversation(template, continuation, turns, end):
    """Ids after ``turns`` of (question, answer), made turn by turn, and made at once."""
    encode = template.tokenizer.encode
    messages = []
    ids = []
    for number, (question, answer) in enumerate(turns):
        if number:
            trimmed, added = continuation.extend(ids, messages[-1], [user(question)])
            ids = ids[: len(ids) - trimmed] + added
        else:
            ids = encode(template.render([user(question)], prompt=True))
        messages.append(user(question))
        assert ids == encode(template.render(messages, prompt=True))
        ids = ids + encode(answer + end)
        messages.append(said(answer))
    return ids


@pytest.mark.parametrize("family", FAMILIES)
@settings(deadline=None, max_examples=50)
@given(turns=st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=4))
def test_turn_by_turn_and_at_once_give_the_same_ids(families, family, turns):
    template, continuation = families[family]
    conversation(template, continuation, turns, END_TOKENS[family])


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "glm"])
def test_a_turn_cut_short_is_ended_as_the_template_does(families, family):
    template, continuation = families[family]
    encode = template.tokenizer.encode
    ids = encode(template.render([user("hi")], prompt=True)) + encode("the")
    trimmed, added = continuation.extend(ids, said("the"), [user("and?")])
    assert trimmed == 0
    assert ids + added == encode(template.render([user("hi"), said("the"), user("and?")], prompt=True))


@pytest.mark.parametrize(("family", "other"), [("chatml", "<|endoftext|>"), ("llama3", "<|eom_id|>")])
def test_another_end_token_gives_way_to_the_templates(families, family, other):
    template, continuation = families[family]
    encode = template.tokenizer.encode
    ids = encode(template.render([user("hi")], prompt=True)) + encode("the" + other)
    trimmed, added = continuation.extend(ids, said("the"), [user("and?")])
    assert trimmed == 1
    assert ids[:-1] + added == encode(template.render([user("hi"), said("the"), user("and?")], prompt=True))


def test_role_token_that_ended_a_turn_gives_way_to_the_role_that_follows(families):
    template, continuation = families["glm"]
    encode = template.tokenizer.encode
    ids = encode(template.render([user("hi")], prompt=True)) + encode("the<|user|>")
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    turn = {"role": "assistant", "content": "the", "tool_calls": [call]}
    trimmed, added = continuation.extend(ids, turn, [{"role": "tool", "content": "3"}])
    assert trimmed == 1
    assert template.tokenizer.decode(added) == "<|observation|>\n<tool_response>3</tool_response><|assistant|>\n"


def test_results_of_several_tools_are_written_together(families):
    template, continuation = families["chatml"]
    call = {"type": "function", "function": {"name": "f", "arguments": {"a": [1]}}}
    turn = {"role": "assistant", "content": "", "tool_calls": [call, call]}
    results = [{"role": "tool", "content": text} for text in "12"]
    ids = template.tokenizer.encode("x<|im_end|>")
    _, added = continuation.extend(ids, turn, results)
    assert template.tokenizer.decode(added) == (
        "\n<|im_start|>user\n<tool_response>\n1\n</tool_response>\n<tool_response>\n2\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_variables_of_the_template_are_those_of_the_request(families):
    template, continuation = families["qwen3"]
    _, added = continuation.extend([], said("x"), [user("a")], {"enable_thinking": False})
    assert template.tokenizer.decode(added).endswith("assistant\n<think>\n\n</think>\n\n")


def test_dropped_reasoning_of_old_turns_changes_no_token(families):
    template, continuation = families["qwen3"]
    encode = template.tokenizer.encode
    ids = encode(template.render([user("hi")], prompt=True)) + encode("<think>\nhm\n</think>\n\nyes<|im_end|>")
    turn = {"role": "assistant", "content": "yes", "reasoning_content": "hm"}
    trimmed, added = continuation.extend(ids, turn, [user("and?")])
    assert (trimmed, template.tokenizer.decode(added)) == (
        0,
        "\n<|im_start|>user\nand?<|im_end|>\n<|im_start|>assistant\n",
    )


def test_end_of_a_conversation_is_completed(families):
    template, continuation = families["chatml"]
    encode = template.tokenizer.encode
    assert continuation.end_of_turn(encode("x<|im_end|>")) == encode("\n")
    assert continuation.end_of_turn(encode("x")) == encode("<|im_end|>\n")
    assert families["glm"][1].end_of_turn(encode("x")) == []


def write(tmp_path, checkpoint, source):
    path = tmp_path / "template.jinja"
    path.write_text(source)
    return ChatTemplate(CheckpointTokenizer(checkpoint("chatml")), path, {})


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{{ raise_exception('no assistants here') }}", "no assistants here"),
        ("{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}", "leaves out"),
    ],
)
def test_templates_that_cannot_be_taken_apart_are_refused_at_the_start(tmp_path, checkpoint, source, reason):
    with pytest.raises(TemplateRefusalError, match=reason):
        Continuation(write(tmp_path, checkpoint, source))


def test_a_turn_that_is_written_differently_when_messages_follow_is_refused(tmp_path, checkpoint):
    source = "{% for m in messages %}{{ loop.length }}{{ m.content }};{% endfor %}"
    continuation = Continuation(write(tmp_path, checkpoint, source))
    with pytest.raises(TemplateRefusalError, match="differently"):
        continuation.extend([], said("x"), [user("a")])


def test_messages_that_the_template_refuses_are_refused(families):
    _, continuation = families["mistral"]
    with pytest.raises(TemplateRefusalError, match="only user and assistant"):
        continuation.extend([], said("x"), [{"role": "tool", "content": "a"}])
