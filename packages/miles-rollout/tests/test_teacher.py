from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from rollout_fakes import FakeServer, Payload, make_group

from miles.core.config import Config
from miles.core.errors import EngineError
from miles.core.types.sample import Sample, Status
from miles.rollout.teacher import Teacher, connect_teacher, start_teacher_engine


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer() as server:
        server.respond = scored
        yield server


def scored(payload: Payload) -> dict[str, Any]:
    """Every token from ``logprob_start_len`` on with its own id as its log-probability; the first one's is unknown."""
    tokens = payload["input_ids"][payload["logprob_start_len"] :]
    entries = [[None if i == 0 else -float(token), token, None] for i, token in enumerate(tokens)]
    return {"text": "", "meta_info": {"input_token_logprobs": entries}}


def sample(tokens: list[int], response_length: int, index: int = 0) -> Sample:
    (made,) = make_group(index, 1)
    made.tokens, made.response_length, made.index, made.status = tokens, response_length, index, Status.COMPLETED
    return made


async def taught(one: Sample, *urls: str) -> Sample:
    teacher = Teacher(urls, deadline_s=60.0)
    try:
        await teacher.score(one)
    finally:
        await teacher.close()
    return one


async def test_the_teacher_scores_the_response_without_writing(server: FakeServer) -> None:
    one = await taught(sample([5, 6, 7, 8], 2), server.url)
    assert one.teacher_log_probs == [-7.0, -8.0]
    (payload,) = server.payloads
    assert payload["input_ids"] == [5, 6, 7, 8]
    assert payload["sampling_params"]["max_new_tokens"] == 0
    assert payload["logprob_start_len"] == 1


def test_a_teacher_of_the_trainers_own_takes_no_engine(tmp_path) -> None:
    config = Config.of(use_opd=True, opd_type="megatron", opd_teacher_load="model")
    assert start_teacher_engine(config, tmp_path) is None
    assert connect_teacher(config, None) is None


async def test_an_empty_response_needs_no_teacher(server: FakeServer) -> None:
    one = await taught(sample([5], 0), server.url)
    assert one.teacher_log_probs == []
    assert not server.payloads


async def test_addresses_may_leave_the_scheme_out(server: FakeServer) -> None:
    assert (await taught(sample([5, 6], 1), server.url.removeprefix("http://"))).teacher_log_probs == [-6.0]


async def test_samples_are_spread_over_teachers_by_their_index() -> None:
    with FakeServer() as even, FakeServer() as odd:
        even.respond = odd.respond = scored
        for index in range(4):
            await taught(sample([index + 1, 9], 1, index), even.url, odd.url)
        assert [payload["input_ids"][0] for payload in even.payloads] == [1, 3]
        assert [payload["input_ids"][0] for payload in odd.payloads] == [2, 4]


async def test_a_teacher_that_scored_something_else_is_told(server: FakeServer) -> None:
    server.respond = lambda payload: {"text": "", "meta_info": {"input_token_logprobs": [[None, 1, None]]}}
    with pytest.raises(EngineError, match=r"scored 1 tokens of sample 0, not the 2"):
        await taught(sample([5, 6, 7], 2), server.url)
