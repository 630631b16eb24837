"""Only sampled tokens train; nothing is longer than it should be; arrays fit together."""

from __future__ import annotations

import base64
import dataclasses
import json
from array import array

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from miles.core.types.sample import Sample
from miles.router.sessions.samples import SampleError, assemble
from miles.router.sessions.trajectory import Generation, Turn, accumulate
from miles.router.sessions.wire import META, write_samples
from miles.router.tokenizer import CheckpointTokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    from chat_templates import write_checkpoint

    return CheckpointTokenizer(write_checkpoint(tmp_path_factory.mktemp("tokenizer"), "chatml"))


def turn(added, output, *, trimmed=0, finish="stop", versions=("1",), token_versions=(), experts=None):
    known = None if token_versions is None else list(token_versions) or [1] * len(output)
    logps = [-0.5 * (n + 1) for n in range(len(output))]
    generation = Generation(list(output), logps, finish, list(versions), known, 2, experts)
    return Turn([], {"role": "assistant", "content": ""}, trimmed, list(added), generation)


def rows(count, first=0, width=2):
    values = array("i", [number for row in range(first, first + count) for number in [row] * width])
    return base64.b64encode(values.tobytes()).decode()


def test_no_turn_no_sample(tokenizer):
    assert assemble([], tokenizer) == []


def test_turns_become_one_sequence(tokenizer):
    (sample,) = assemble([turn([1, 2], [3, 4]), turn([5], [6])], tokenizer)
    assert sample.tokens == [1, 2, 3, 4, 5, 6]
    assert sample.loss_mask == [1, 1, 0, 1]
    assert sample.rollout_log_probs == [-0.5, -1.0, 0.0, -0.5]
    assert sample.token_weight_versions == [1, 1, 1, 1]
    assert (sample.status, sample.weight_versions) == ("completed", ["1", "1"])
    assert (sample.cached_tokens, sample.prompt_tokens) == (4, 2 + 5)
    assert sample.metadata == {"num_turns": 2}


def test_what_the_next_prompt_dropped_does_not_train(tokenizer):
    (sample,) = assemble([turn([1, 2], [3, 4]), turn([5], [6], trimmed=1)], tokenizer)
    assert sample.tokens == [1, 2, 3, 5, 6]
    assert sample.loss_mask == [1, 0, 1]
    assert sample.rollout_log_probs == [-0.5, 0.0, -0.5]
    assert sample.status == "completed"


@pytest.mark.parametrize(("finish", "status"), [("length", "truncated"), ("abort", "aborted")])
def test_sample_ends_with_the_turn_that_was_cut(tokenizer, finish, status):
    (sample,) = assemble([turn([1], [2]), turn([3], [4], finish=finish), turn([5], [6])], tokenizer)
    assert sample.tokens == [1, 2, 3, 4]
    assert sample.status == status


@pytest.mark.parametrize(
    ("limit", "tokens", "mask", "status"),
    [
        (8, [1, 2, 3, 4, 5, 6, 7], [1, 1, 0, 1, 1], "completed"),
        (7, [1, 2, 3, 4, 5, 6, 7], [1, 1, 0, 1, 1], "completed"),
        (6, [1, 2, 3, 4, 5, 6], [1, 1, 0, 1], "truncated"),
        (5, [1, 2, 3, 4], [1, 1], "truncated"),
        (3, [1, 2, 3], [1], "truncated"),
        (2, [1, 2], [], "truncated"),
        (1, [1, 2], [], "truncated"),
    ],
)
def test_sequence_is_cut_at_the_limit(tokenizer, limit, tokens, mask, status):
    (sample,) = assemble([turn([1, 2], [3, 4]), turn([5], [6, 7])], tokenizer, limit)
    assert (sample.tokens, sample.loss_mask, sample.status) == (tokens, mask, status)


def test_response_is_the_text_less_the_token_that_ends_it(tokenizer):
    first, second = tokenizer.encode("yes<|im_end|>"), tokenizer.encode("no<|im_end|>")
    (sample,) = assemble([turn([1], first), turn(tokenizer.encode(" and "), second)], tokenizer)
    assert sample.response == "yes<|im_end|> and no"
    (sample,) = assemble([turn([1], [])], tokenizer)
    assert sample.response == ""


def test_versions_that_are_no_numbers_are_named_only_by_turn(tokenizer):
    (sample,) = assemble(
        [turn([1], [2]), turn([3], [4], versions=["new"], token_versions=None), turn([5], [6])], tokenizer
    )
    assert sample.token_weight_versions is None
    assert sample.weight_versions == ["1", "new", "1"]


def test_each_token_keeps_the_experts_it_was_sampled_with(tokenizer):
    first = turn([1, 2], [3, 4], experts=rows(3))
    second = turn([5], [6], experts=rows(5, first=10))
    (sample,) = assemble([first, second], tokenizer)
    assert list(sample.routed_experts) == [0, 0, 1, 1, 2, 2, 13, 13, 14, 14]


def test_experts_are_cut_with_their_tokens(tokenizer):
    first = turn([1, 2], [3, 4], experts=rows(3))
    (sample,) = assemble([first, turn([5], [6], trimmed=1, experts=rows(4, first=10))], tokenizer)
    assert list(sample.routed_experts) == [0, 0, 1, 1, 12, 12, 13, 13]
    (sample,) = assemble([first], tokenizer, 3)
    assert list(sample.routed_experts) == [0, 0, 1, 1]


def test_experts_of_a_stop_string_have_one_row_more(tokenizer):
    (sample,) = assemble([turn([1, 2], [3, 4], experts=rows(4))], tokenizer)
    assert list(sample.routed_experts) == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize(
    ("turns", "problem"),
    [
        ([turn([1], [2], experts=rows(1)), turn([3], [4])], "turn 1 has no routed experts"),
        ([turn([1], [2]), turn([3], [4], experts=rows(3))], "turn 1 has routed experts, earlier turns have none"),
        ([turn([1, 2], [3, 4], experts=rows(1, width=5))], "5 routed experts do not divide into 3 rows"),
        ([turn([1, 2, 3], [4], experts=rows(1, width=1))], "do not divide"),
    ],
)
def test_experts_that_do_not_fit_are_refused(tokenizer, turns, problem):
    with pytest.raises(SampleError, match=problem):
        assemble(turns, tokenizer)


@settings(deadline=None)
@given(data=st.data())
def test_a_sample_is_the_trajectory_and_trains_on_each_sampled_token(data, tokenizer):
    ids = st.lists(st.integers(0, 200), min_size=1, max_size=4)
    shapes = data.draw(st.lists(st.tuples(ids, ids, st.booleans()), min_size=1, max_size=5))
    turns = [
        turn(added, output, trimmed=int(trims and number > 0)) for number, (added, output, trims) in enumerate(shapes)
    ]
    (sample,) = assemble(turns, tokenizer)
    assert sample.tokens == accumulate(turns)
    num_trimmed = sum(one.trimmed for one in turns)
    assert sum(sample.loss_mask) == sum(len(one.generation.output) for one in turns) - num_trimmed
    for mask, logp in zip(sample.loss_mask, sample.rollout_log_probs):
        assert (logp < 0) == bool(mask)
    Sample.from_dict(sample.as_json()).validate()
    limit = data.draw(st.integers(1, len(sample.tokens) + 1))
    (cut,) = assemble(turns, tokenizer, limit)
    assert len(cut.tokens) <= max(limit, len(turns[0].added))
    assert cut.tokens == sample.tokens[: len(cut.tokens)] or num_trimmed
    Sample.from_dict(cut.as_json()).validate()


def read(wire):
    size = int.from_bytes(wire[:8], "little")
    header = json.loads(wire[8 : 8 + size])
    kinds = {"I64": "q", "U8": "B", "F64": "d", "I32": "i"}
    tensors = {}
    for name, entry in header.items():
        begin, end = (8 + size + offset for offset in entry["data_offsets"])
        tensors[name] = (entry["shape"], list(array(kinds[entry["dtype"]], wire[begin:end])))
    return tensors


def test_samples_travel_as_safetensors(tokenizer):
    (sample,) = assemble([turn([1, 2], [3, 4], experts=rows(3))], tokenizer)
    bare = dataclasses.replace(sample, token_weight_versions=None, routed_experts=None)
    tensors = read(write_samples([sample, bare]))
    assert tensors["tokens.0"] == ([4], [1, 2, 3, 4])
    assert tensors["loss_mask.1"] == ([2], [1, 1])
    assert tensors["rollout_log_probs.0"] == ([2], [-0.5, -1.0])
    assert tensors["token_weight_versions.0"] == ([2], [1, 1])
    assert tensors["rollout_routed_experts.0"] == ([3, 2], [0, 0, 1, 1, 2, 2])
    assert "token_weight_versions.1" not in tensors
    assert "rollout_routed_experts.1" not in tensors
    meta = json.loads(bytes(tensors[META][1]))
    assert [entry["response_length"] for entry in meta] == [2, 2]
    assert read(write_samples([])) == {META: ([2], list(b"[]"))}


def test_safetensors_reads_it(tokenizer):
    safetensors = pytest.importorskip("safetensors.numpy")
    (sample,) = assemble([turn([1, 2], [3, 4], experts=rows(3))], tokenizer)
    tensors = safetensors.load(write_samples([sample]))
    assert tensors["tokens.0"].tolist() == [1, 2, 3, 4]
    assert tensors["rollout_routed_experts.0"].shape == (3, 2)
