"""Text in, the sampled tokens out: over real sockets."""

from __future__ import annotations

import asyncio
import json

import pytest
from speaker import Speaker

from miles.router.middleware.radix_cache import _KEPT_VERSIONS, _THREAD_FROM_CHARS, RadixCache, _replay
from miles.router.settings import Settings
from miles.router.tokenizer import CheckpointTokenizer

END = "<|im_end|>"


@pytest.fixture
def make_stage(make_worker, make_router, checkpoint):
    async def make(*texts, **settings):
        directory = checkpoint("chatml")
        speaker = Speaker(CheckpointTokenizer(directory), END, list(texts) or ["well"])
        worker = await make_worker(speaker)
        router = await make_router(worker, middleware=("radix_cache",), tokenizer=directory, **settings)
        return router, worker, speaker

    return make


async def generate(router, text, **fields):
    return await router.post("/generate", json.dumps({"text": text} | fields).encode())


async def retrieve(router, text):
    answer = await router.post("/retrieve_from_text", json.dumps({"text": text, "return_logp": True}).encode())
    assert answer.status == 200, answer.body
    return answer.json()


async def test_first_text_is_sent_as_its_tokens(make_stage):
    router, _, speaker = await make_stage("yes")
    answer = await generate(router, "is it?", sampling_params={"temperature": 0.5})
    assert answer.json()["text"] == "yes"
    (sent,) = speaker.bodies
    assert sent["input_ids"] == speaker.tokenizer.encode("is it?")
    assert "text" not in sent
    assert sent["return_logprob"] is True
    assert sent["sampling_params"] == {"temperature": 0.5}


async def test_sampled_tokens_come_back_whatever_a_tokenizer_would_make_of_their_text(make_stage):
    router, _, speaker = await make_stage()
    odd = [speaker.tokenizer.encode(letter)[0] for letter in "the user"]  # letter by letter
    assert odd != speaker.tokenizer.encode("the user")
    speaker.extra = {
        "output_token_logprobs": [[-0.25, token, None] for token in odd], "completion_tokens": len(odd),
    }  # fmt: skip
    await generate(router, "say: ")
    await generate(router, "say: the user asks")
    encode = speaker.tokenizer.encode
    assert speaker.prompts[1] == encode("say: ") + odd + encode(" asks")


async def test_text_with_and_without_the_end_token_is_known(make_stage):
    router, _, speaker = await make_stage("yes", "no")
    await generate(router, "is it?")
    encode = speaker.tokenizer.encode
    with_end = await retrieve(router, f"is it?yes{END}\nand?")
    without = await retrieve(router, "is it?yes and?")
    assert with_end["tokens"] == encode("is it?") + encode("yes") + encode(END) + encode("\nand?")
    assert without["tokens"] == encode("is it?") + encode("yes") + encode(" and?")
    prompt, said, rest = len(encode("is it?")), len(encode("yes")), len(encode("\nand?"))
    assert with_end["loss_mask"] == [0] * prompt + [1] * (said + 1) + [0] * rest
    logps = [-0.5 - number for number in range(said + 1)]
    assert with_end["rollout_logp"] == [0.0] * prompt + logps + [0.0] * rest
    assert with_end["weight_versions"] == [None] * prompt + ["3"] * (said + 1) + [None] * rest
    assert with_end["token_length"] == with_end["loss_mask_length"] == len(with_end["tokens"])
    assert with_end["response"] == f"is it?yes{END}\nand?"


async def test_turns_build_on_turns(make_stage):
    router, _, speaker = await make_stage("one", "two")
    await generate(router, "a")
    await generate(router, f"a{'one'}{END}b")
    found = await retrieve(router, f"aone{END}btwo{END}")
    encode = speaker.tokenizer.encode
    assert found["tokens"] == speaker.prompts[1] + encode("two" + END)
    assert sum(found["loss_mask"]) == len(encode("one" + END)) + len(encode("two" + END))


async def test_other_requests_pass_untouched(make_stage):
    router, worker, _ = await make_stage()
    body = b'{"text":["a",  "b"]}'
    await router.post("/generate", body)
    await router.post("/generate", b'{"input_ids":[1,  2]}')
    assert worker.requests[0].body == body
    assert worker.requests[1].body == b'{"input_ids":[1,  2]}'
    assert (await router.get("/health")).status == 200


async def test_stream_is_passed_on_as_it_is(make_stage):
    async def stream(conversation):
        assert "input_ids" in conversation.request.json()
        await conversation.send(
            b"HTTP/1.1 200 X\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
        )
        await conversation.send(b"6\r\ndata: \r\n0\r\n\r\n")

    router, worker, _ = await make_stage()
    worker.behaviour = stream
    answer = await generate(router, "a", stream=True)
    assert answer.body == b"data: "


@pytest.mark.parametrize("body", [b"[]", b"not json"])
async def test_bodies_that_are_no_json_object_are_refused(make_stage, body):
    router, worker, _ = await make_stage()
    assert (await router.post("/generate", body)).status == 400
    assert (await router.post("/retrieve_from_text", body)).status == 400
    assert not worker.requests


async def test_text_is_required_to_retrieve(make_stage):
    router, _, _ = await make_stage()
    answer = await router.post("/retrieve_from_text", b"{}")
    assert answer.status == 400
    assert "'text'" in answer.json()["error"]["message"]


async def test_body_above_the_limit_is_refused(make_stage):
    router, _, _ = await make_stage(max_body_bytes=100)
    assert (await generate(router, "a" * 200)).status == 413


async def test_client_that_leaves_while_sending_is_no_request(checkpoint):
    class Router:
        settings = Settings()
        tokenizer = CheckpointTokenizer(checkpoint("chatml"))

    messages = [{"type": "http.request", "body": b"{", "more_body": True}, {"type": "http.disconnect"}]
    reached = []

    async def receive():
        return messages.pop(0)

    async def app(*arguments):
        reached.append(arguments)

    cache = RadixCache(app, router=Router())
    await cache({"type": "http", "method": "POST", "path": "/generate"}, receive, app)
    assert not messages
    assert not reached


@pytest.mark.parametrize("body", [b"no json", b"[]", b"{}", b'{"meta_info": {}}', b'{"meta_info": null}'])
async def test_answers_without_tokens_are_passed_on_and_not_remembered(make_stage, body):
    router, worker, _ = await make_stage()

    async def answer(conversation):
        await conversation.answer(body)

    worker.behaviour = answer
    assert (await generate(router, "abc")).body == body
    assert not any((await retrieve(router, "abc"))["loss_mask"])


async def test_errors_of_workers_are_passed_on(make_stage):
    router, worker, _ = await make_stage()

    async def answer(conversation):
        await conversation.answer(b'{"meta_info": {"output_token_logprobs": [[0.0, 1, null]]}}', 400)

    worker.behaviour = answer
    assert (await generate(router, "abc")).status == 400
    assert not any((await retrieve(router, "abc"))["loss_mask"])


async def test_the_application_inside_hears_the_request_and_then_the_client():
    async def leave():
        return {"type": "http.disconnect"}

    receive = _replay(b"body", leave)
    assert await receive() == {"type": "http.request", "body": b"body", "more_body": False}
    assert await receive() == {"type": "http.disconnect"}


async def test_samples_of_old_weights_are_forgotten(make_stage):
    router, _, speaker = await make_stage("x")
    await generate(router, "a")
    speaker.version = str(3 + _KEPT_VERSIONS)
    await generate(router, "b")
    assert not any((await retrieve(router, "ax"))["loss_mask"])
    assert any((await retrieve(router, "bx"))["loss_mask"])


async def test_unversioned_and_named_weights_are_remembered(make_stage):
    router, _, speaker = await make_stage("x")
    speaker.version = None
    await generate(router, "a")
    speaker.version = "default"
    await generate(router, "b")
    assert any((await retrieve(router, "ax"))["loss_mask"])
    assert (await retrieve(router, "bx"))["weight_versions"][-1] == "default"


async def test_memory_is_bounded(make_stage):
    router, _, _ = await make_stage("x", radix_cache_tokens=50)
    for number in range(20):
        await generate(router, f"prompt number {number}")
    assert not any((await retrieve(router, "prompt number 0x"))["loss_mask"])
    assert any((await retrieve(router, "prompt number 19x"))["loss_mask"])


async def test_long_texts_do_not_hold_up_the_loop(make_stage):
    router, _, speaker = await make_stage("x")
    text = "long " * _THREAD_FROM_CHARS
    answers = await asyncio.gather(generate(router, text), generate(router, "short"))
    assert [answer.status for answer in answers] == [200, 200]
    assert speaker.tokenizer.encode(text) in speaker.prompts
