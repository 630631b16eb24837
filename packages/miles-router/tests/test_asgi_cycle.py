"""What ASGI applications may do with a request of the slow path, and what clients see of it."""

from __future__ import annotations

import asyncio

import httptools
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from miles.router import asgi_cycle
from miles.router.asgi_head import read_plain_asgi_head

START = {"type": "http.response.start", "status": 200, "headers": []}
LENGTH = (b"Content-Length", b"6")
END = {"type": "http.response.body", "body": b"end"}


@pytest.fixture
def serve(make_worker, make_router, middleware_that):
    async def serve(act):
        def instead_of_the_router(app, scope, receive, send):
            return act(scope, receive, send)

        return await make_router(await make_worker(), middleware=(middleware_that(instead_of_the_router),), ready=False)

    return serve


def start(*headers, status=200):
    return {"type": "http.response.start", "status": status, "headers": headers}


def body(content, more=False):
    return {"type": "http.response.body", "body": content, "more_body": more}


def saying(*messages):
    async def act(scope, receive, send):
        for message in messages:
            await send(message)

    return act


@pytest.mark.parametrize(
    "messages",
    [
        [],
        [START],
        [END],
        [START, START],
        [start((b"content-length", b"2")), body(b"abc")],
        [start((b"content-length", b"4")), body(b"abc")],
        [start((b"x", b"a\r\nb: c")), END],
        [start((b"x y", b"a")), END],
        [start((b"content-length", b"three")), END],
    ],
)
async def test_an_application_that_breaks_the_rules_costs_an_error(serve, messages, caplog):
    answer = await (await serve(saying(*messages))).post()
    assert (answer.status, answer.body) == (500, b"Internal Server Error")
    assert answer.header("connection") == "close"
    assert "ASGI" in caplog.text


@pytest.mark.parametrize(
    ("messages", "rest"),
    [
        ([start((b"content-length", b"9")), body(b"abc", True)], b"abc"),
        ([start((b"content-length", b"9")), body(b"abc", True), END], b"abc"),
        ([START, body(b"abc", True), body(b"", True), START], b"3\r\nabc\r\n"),
    ],
)
async def test_a_fault_after_the_first_bytes_closes_the_connection(serve, messages, rest):
    router = await serve(saying(*messages))
    client = await router.connect()
    await client.send(b"GET /a HTTP/1.1\r\nhost: a\r\n\r\n")
    assert (await client.reader.read()).partition(b"\r\n\r\n")[2] == rest


@pytest.mark.parametrize(
    ("headers", "wire"),
    [
        ((), b"transfer-encoding: chunked\r\n\r\n3\r\nabc\r\n3\r\nend\r\n0\r\n\r\n"),
        (((b"Transfer-Encoding", b"chunked"),), b"transfer-encoding: chunked\r\n\r\n3\r\nabc\r\n3\r\nend\r\n0\r\n\r\n"),
        ((LENGTH,), b"content-length: 6\r\n\r\nabcend"),
        ((LENGTH, (b"Connection", b"Close")), b"content-length: 6\r\nconnection: Close\r\n\r\nabcend"),
    ],
)  # fmt: skip
async def test_an_answer_in_two_parts_is_framed_as_its_head_says(serve, headers, wire):
    router = await serve(saying(start(*headers), body(b"abc", True), END))
    client = await router.connect()
    await client.send(b"GET /a HTTP/1.1\r\nhost: a\r\n\r\n")
    assert await client.reader.readexactly(17 + len(wire)) == b"HTTP/1.1 200 OK\r\n" + wire
    if b"Close" in wire:
        assert await client.closed()


async def test_a_body_too_long_to_keep_is_passed_on_as_it_comes(make_worker, make_router):
    worker = await make_worker()
    router = await make_router(worker, hot_path="off", buffered_body_bytes=1000)
    client = await router.connect()
    await client.send(b"POST /a HTTP/1.1\r\nhost: a\r\ncontent-length: 4000\r\n\r\n" + b"a" * 2000)
    await router.until(lambda: router.worker(worker).in_flight == 1)
    await client.send(b"b" * 2000)
    assert (await client.response()).body == b"a" * 2000 + b"b" * 2000


async def test_a_client_of_http_1_0_gets_no_chunks(serve):
    router = await serve(saying(start((b"transfer-encoding", b"chunked")), body(b"abc", True), END))
    client = await router.connect()
    await client.send(b"GET /a HTTP/1.0\r\n\r\n")
    assert await client.reader.read() == b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\nabcend"


async def test_what_is_sent_after_the_end_is_an_error_that_the_client_does_not_see(serve, caplog):
    router = await serve(saying(start(LENGTH), body(b"abcend"), END))
    assert (await router.post()).body == b"abcend"
    await router.until(lambda: "sent after the end of the answer" in caplog.text)


async def test_unknown_statuses_and_answers_without_a_body_are_sent(serve):
    router = await serve(saying(start(status=299), END))
    assert (await router.post()).status == 299
    router = await serve(saying(start(status=204), body(b"")))
    client = await router.connect()
    await client.send(b"GET /a HTTP/1.1\r\nhost: a\r\n\r\n" * 2)  # the second one shows where the first answer ends
    assert await client.reader.readexactly(54) == b"HTTP/1.1 204 No Content\r\n\r\n" * 2


async def test_a_long_part_is_sent_whole(serve):
    content = b"x" * 300_000
    answer = await (await serve(saying(start((b"content-length", b"300000")), body(content)))).post()
    assert answer.body == content


async def test_receive_hears_that_the_answer_is_complete_and_that_the_client_left(serve):
    heard = asyncio.Queue()

    async def act(scope, receive, send):
        if scope["path"] == "/answer":
            waiting = asyncio.create_task(receive()) if (await receive())["body"] else None
            await asyncio.sleep(0)
            await send(start((b"content-length", b"3")))
            await send(END)
            heard.put_nowait(await waiting)
        else:
            heard.put_nowait((await receive(), await receive()))
            await send(START)

    router = await serve(act)
    assert (await router.post("/answer")).body == b"end"
    assert await heard.get() == {"type": "http.disconnect"}
    client = await router.connect()
    await client.send(b"GET /leave HTTP/1.1\r\nhost: a\r\n\r\n")
    client.close()
    request, then = await heard.get()
    assert request == {"type": "http.request", "body": b"", "more_body": False}
    assert then == {"type": "http.disconnect"}


async def test_white_space_around_a_value_is_no_part_of_it(serve):
    seen = []

    async def act(scope, receive, send):
        seen.append(dict(scope["headers"])[b"x-custom"])
        await send(START)
        await send(END)

    client = await (await serve(act)).connect()
    for rest in (b"\r\n", b"Content-Length: 0\r\n\r\n"):  # left to the parser, read in one pass
        await client.send(b"GET / HTTP/1.1\r\nhost: a\r\nx-custom: \t b c \t\r\n" + rest)
        assert (await client.response()).body == b"end"
    assert seen == [b"b c", b"b c"]


async def test_nothing_is_remembered_for_ever(serve, monkeypatch):
    monkeypatch.setattr(asgi_cycle, "_MAX_KNOWN_LINES", 2)
    headers = [(b"x-%d" % number, b"1") for number in range(5)]
    answer = await (await serve(saying(start(*headers), END))).post()
    assert [name for name, _ in answer.headers if name.startswith("x-")] == [f"x-{number}" for number in range(5)]
    assert len(asgi_cycle._known_lines) <= 2


class Seen:
    def __init__(self, data):
        self.headers = []
        self.parser = httptools.HttpRequestParser(self)
        self.parser.feed_data(data)

    def on_url(self, url):
        self.target = url

    def on_header(self, name, value):
        self.headers.append((name.lower(), value.rstrip(b" \t")))  # as the protocol does


NAMES = st.sampled_from(["Accept", "x-custom", "connection", "COOKIE"])
VALUES = st.one_of(st.just("keep-alive"), st.text(st.characters(max_codepoint=255), max_size=8))
FIELDS = st.lists(st.tuples(NAMES, st.sampled_from([":", ": ", ":\t "]), VALUES), max_size=3)
TARGETS = st.sampled_from(["/", "/generate?a=b", "/a%20b", "//x", "/a?", "/a;b?c?d", "//"])


@settings(max_examples=200, deadline=None)
@given(TARGETS, FIELDS, FIELDS)
@example("/", [("Accept", ":", " 0 \t")], [("x-custom", ":", "0 ")])
def test_a_plain_head_means_what_the_parser_says(target, earlier, later):
    def lines(fields):
        return "".join(f"{name}{colon}{value}\r\n" for name, colon, value in fields)

    text = f"POST {target} HTTP/1.1\r\nHost: a\r\n{lines(earlier)}Content-Length: 0\r\n{lines(later)}\r\n"
    data = text.encode("latin-1")
    for known in (read_plain_asgi_head(data), read_plain_asgi_head(data)):
        if known is not None:
            head, length, _ = known
            seen = Seen(data)
            assert head.headers(length) == seen.headers
            url = httptools.parse_url(seen.target)
            assert (head.line.part["raw_path"], head.line.part["query_string"]) == (url.path, url.query or b"")
