import contextlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from miles.rollout.engines.embedded.protocol import BadRequest, parse_generate, parse_sampling_params
from miles.rollout.engines.embedded.sampling import SamplingParams


def test_defaults():
    request = parse_generate({"input_ids": [1, 2]})
    assert (request.batched, request.stream) == (False, False)
    item = request.items[0]
    assert item.params == SamplingParams()
    assert (item.return_logprob, item.logprob_start_len, item.top_logprobs_num, item.rid) == (False, -1, 0, None)


def test_null_is_the_default():
    params = parse_sampling_params({"temperature": None, "stop": None, "max_new_tokens": None, "sampling_seed": None})
    assert params == SamplingParams()


def test_a_batch_spreads_what_is_given_once_or_for_each():
    request = parse_generate(
        {
            "input_ids": [[1], [2, 3]],
            "rid": ["a", "b"],
            "sampling_params": {"n": 2},
            "return_logprob": [True, False],
            "logprob_start_len": 0,
        }
    )
    assert request.batched
    assert [item.rid for item in request.items] == ["a", "b"]
    assert [item.params.n for item in request.items] == [2, 2]
    assert [item.return_logprob for item in request.items] == [True, False]
    assert [item.logprob_start_len for item in request.items] == [0, 0]


def test_a_batch_under_one_name_gets_a_name_for_each():
    request = parse_generate({"text": ["a", "b"], "rid": "x"})
    assert [item.rid for item in request.items] == ["x_0", "x_1"]


@pytest.mark.parametrize("stop", ["a", ["a"], ("a",)])
def test_stop_strings_come_alone_or_in_a_list(stop):
    if isinstance(stop, tuple):
        with pytest.raises(BadRequest, match="stop must be a string or a list of strings"):
            parse_sampling_params({"stop": stop})
    else:
        assert parse_sampling_params({"stop": stop}).stop == ("a",)


def test_what_changes_no_result_is_accepted():
    parse_generate({"input_ids": [1], "log_metrics": False, "priority": 3, "return_hidden_states": False})
    parse_sampling_params({"spaces_between_special_tokens": False, "json_schema": None, "logit_bias": {}})


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ([], "must be a JSON object"),
        ({}, "either text or input_ids"),
        ({"text": "a", "input_ids": [1]}, "either text or input_ids"),
        ({"text": []}, "at least one prompt"),
        ({"text": 3}, "text must be a string"),
        ({"input_ids": ["a"]}, "list of integers"),
        ({"input_ids": [True]}, "list of integers"),
        ({"input_ids": [1], "sampling_parms": {}}, "unknown field 'sampling_parms'; did you mean 'sampling_params'"),
        ({"input_ids": [1], "lora_path": "x"}, "does not support lora_path"),
        ({"input_ids": [1], "image_data": ["x"]}, "does not support image_data"),
        ({"input_ids": [1], "top_logprobs_num": -1}, "top_logprobs_num is -1"),
        ({"input_ids": [[1], [2]], "rid": ["a"]}, "rid has 1 entries for 2 prompts"),
        ({"input_ids": [[1], [2]], "stream": True}, "single prompt"),
        ({"input_ids": [1], "stream": True, "sampling_params": {"n": 2}}, "single prompt"),
        ({"input_ids": [1], "sampling_params": [1]}, "must be an object"),
    ],
)
def test_bodies_that_are_refused(body, message):
    with pytest.raises(BadRequest, match=message):
        parse_generate(body)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"temprature": 1}, "unknown sampling parameter 'temprature'; did you mean 'temperature'"),
        ({"temperature": -0.1}, "temperature is -0.1; it must be at least 0"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": "hot"}, "it must be a number"),
        ({"top_p": 0}, r"top_p is 0.0; it must be in \(0, 1\]"),
        ({"top_p": 1.01}, "top_p is 1.01"),
        ({"top_k": 0}, "top_k is 0; it must be at least 1, or -1"),
        ({"min_p": 2}, "min_p is 2.0"),
        ({"n": 0}, "n is 0"),
        ({"max_new_tokens": -1}, "max_new_tokens is -1"),
        ({"max_new_tokens": 1.5}, "it must be an integer"),
        ({"min_new_tokens": 5, "max_new_tokens": 4}, "between 0 and max_new_tokens, which is 4"),
        ({"frequency_penalty": 3}, "frequency_penalty is 3.0"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0.0"),
        ({"sampling_seed": 2**63}, "must fit 64 bits"),
        ({"stop": [1]}, "stop must be a string"),
        ({"stop": ["x"] * 33}, "at most 32"),
        ({"stop_token_ids": "2"}, "list of integers"),
        ({"json_schema": "{}"}, "does not support json_schema"),
        ({"regex": "a+"}, "does not support regex"),
        ({"logit_bias": {"3": 1.0}}, "does not support logit_bias"),
    ],
)
def test_sampling_parameters_that_are_refused(params, message):
    with pytest.raises(BadRequest, match=message):
        parse_sampling_params(params)


@settings(max_examples=50)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    )
)
def test_nonsense_is_refused_and_nothing_else_happens(value):
    for body in (value, {"input_ids": value}, {"text": value}, {"input_ids": [1], "sampling_params": value}):
        with contextlib.suppress(BadRequest):
            parse_generate(body)


@given(
    st.dictionaries(
        st.sampled_from(sorted(SamplingParams.__dataclass_fields__)),
        st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.lists(st.integers()),
    )
)
def test_parameters_that_pass_have_the_promised_types(params):
    try:
        parsed = parse_sampling_params(params)
    except BadRequest:
        return
    assert type(parsed.max_new_tokens) is int
    assert type(parsed.temperature) is float
    assert all(isinstance(text, str) for text in parsed.stop)
    assert 0 <= parsed.min_new_tokens <= parsed.max_new_tokens
