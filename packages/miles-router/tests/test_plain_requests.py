"""The short cut for plain requests reads them exactly as the parser does, and leaves all others to it."""

from __future__ import annotations

from types import SimpleNamespace

import httptools
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from miles.router.plain import PLAIN_REQUEST, PlainExchange, PlainHead, read_plain_head

NAMES = st.sampled_from(
    ["host", "Host", "content-length", "Content-Length", "connection", "te", "transfer-encoding", "expect", "upgrade",
     "trailer", "keep-alive", "x-custom", "Accept", "x y", "", "x\t", "ü", "cookie"]
)  # fmt: skip
VALUES = st.one_of(
    st.sampled_from(
        ["a", "", "3", " 3 ", "3,3", "+3", "0x3", "keep-alive", "chunked", "a\tb", "\xff", "a\x00b", "a\rb", "a\nb"]
    ),
    st.text(st.characters(max_codepoint=255), max_size=8),
)
TARGETS = st.one_of(
    st.sampled_from(["/", "/generate?a=b", "/a%20b", "*", "http://x/", "/a b", "/a#b", "", "/ü", "/a\x7f"]),
    st.text(st.characters(max_codepoint=255), max_size=8).map("/".__add__),
)
ENDS = st.sampled_from(["\r\n", "\r\n", "\r\n", "\r\n", "\n", "\r"])


class Seen:
    """What the parser understood of one request; None of a part that has not come."""

    def __init__(self, data: bytes) -> None:
        self.target = b""
        self.headers: list[tuple[bytes, bytes]] = []
        self.body = b""
        self.num_complete = 0
        parser = httptools.HttpRequestParser(self)
        parser.feed_data(data)
        self.method = parser.get_method()
        self.version = parser.get_http_version()
        self.keep_alive = parser.should_keep_alive()
        self.upgrade = parser.should_upgrade()

    def on_url(self, url: bytes) -> None:
        self.target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers.append((name, value.rstrip(b" \t")))  # as the protocol does

    def on_body(self, body: bytes) -> None:
        self.body += body

    def on_message_complete(self) -> None:
        self.num_complete += 1


@settings(max_examples=400, deadline=None)
@given(
    method=st.sampled_from(["GET", "POST", "PUT", "HEAD", "CONNECT", "post", "PRI", "DELETE"]),
    target=TARGETS,
    version=st.sampled_from(["HTTP/1.1", "HTTP/1.1", "HTTP/1.0", "HTTP/2.0"]),
    fields=st.lists(st.tuples(NAMES, VALUES, ENDS), max_size=4),
    plainly=st.booleans(),
)
def test_what_is_taken_for_plain_means_the_same_to_the_parser(method, target, version, fields, plainly):
    lines = [f"{method} {target} {version}\r\n"]
    if plainly:
        lines += ["Host: x\r\n", *(f"{name}: {value}{end}" for name, value, end in fields), "Content-Length: 3\r\n"]
    else:
        lines += [f"{name}: {value}{end}" for name, value, end in fields]
    data = "".join([*lines, "\r\n"]).encode("latin-1") + b"abc"
    match = PLAIN_REQUEST.match(data)
    if match is None or len(data) - match.end() != int(match[4]):
        return
    seen = Seen(data)
    assert (seen.num_complete, seen.body) == (1, data[match.end() :])
    assert (seen.method, seen.target, seen.version) == (match[1], match[2], "1.1")
    assert seen.keep_alive
    assert not seen.upgrade
    head = PlainHead(match)
    lines = head.fields.removesuffix(b"content-length: ") + head.later_fields
    passed = [line.split(b":", 1) for line in lines.split(b"\r\n")[1:-1]]
    assert data[head.rest_at :] == match[4] + data[match.end(4) :]
    assert [(name, value.strip(b" \t")) for name, value in passed] == [
        (name, value) for name, value in seen.headers if name.lower() not in (b"host", b"content-length", b"connection")
    ]


@pytest.mark.parametrize(
    "fields",
    [
        ["content-length: 3"],
        ["host: x"],
        ["host: x", "content-length: 3", "content-length: 3"],
        ["host: x", "host: y", "content-length: 3"],
        ["host: x", "transfer-encoding: chunked", "content-length: 3"],
        ["host: x", "connection: close", "content-length: 3"],
        ["host: x", "expect: 100-continue", "content-length: 3"],
        ["host: x", "Upgrade: h2c", "content-length: 3"],
        ["host: x", "content-length : 3"],
        ["host: x", " folded", "content-length: 3"],
        ["host: x", "content-length: 3\nx: y"],
    ],
)
def test_whatever_concerns_the_connection_is_left_to_the_parser(fields):
    assert PLAIN_REQUEST.match("\r\n".join(["POST / HTTP/1.1", *fields, "\r\n"]).encode()) is None


@pytest.mark.parametrize("cut", [1, 20, 60, -1])
async def test_requests_in_pieces_are_put_together(make_worker, make_router, until, cut):
    worker = await make_worker()
    router = await make_router(worker)
    client = await router.connect()
    request = b"POST /generate HTTP/1.1\r\nHost: x\r\nX-A: b\r\nContent-Length: 5\r\n\r\nhello"
    assert (await client.post()).status == 200
    await client.send(request[:cut])
    connections = router.server._uvicorn.server_state.connections
    await until(lambda: any(connection._parsing for connection in connections))
    await client.send(request[cut:])
    assert (await client.response()).body == b"hello"
    assert (await client.post()).status == 200
    assert [request.header("x-a") for request in worker.requests] == [None, "b", None]


async def test_fields_arrive_as_they_were_written(make_worker, make_router):
    worker = await make_worker()
    router = await make_router(worker)
    client = await router.connect()
    await client.send(b"POST /p?q HTTP/1.1\r\nHOST: x\r\nX-Odd:  a  b\t\r\nContent-Length: 2\r\ncookie: \xe9\r\n\r\nhi")
    assert (await client.response()).body == b"hi"
    head = worker.requests[0].raw_head
    assert head.startswith(b"POST /p?q HTTP/1.1\r\nhost: 127.0.0.1:")
    assert head.endswith(b"\r\nX-Odd:  a  b\t\r\ncontent-length: 2\r\ncookie: \xe9\r\n\r\n")


@pytest.mark.parametrize("field", ["connection: keep-alive", "Connection:Keep-Alive "])
async def test_a_client_may_ask_for_what_is_the_rule(make_worker, make_router, field):
    worker = await make_worker()
    router = await make_router(worker)
    client = await router.connect()
    for body in (b"hi", b"hello"):
        head = (
            f"POST / HTTP/1.1\r\nHost: x\r\nx-connection: keep-alive\r\n{field}\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        await client.send(head.encode() + body)
        assert (await client.response()).body == body
    assert [request.header("connection") for request in worker.requests] == [None, None]
    assert [request.header("x-connection") for request in worker.requests] == ["keep-alive", "keep-alive"]


def test_a_request_that_is_not_short_is_sent_on_without_a_copy():
    body = bytes(range(256)) * 400
    data = b"POST /x HTTP/1.1\r\nhost: a\r\ncontent-length: 102400\r\n\r\n" + body
    head, length, body_at = read_plain_head(data)
    written = []
    transport = SimpleNamespace(writelines=written.extend)
    connection = SimpleNamespace(transport=transport, worker=SimpleNamespace(authority=b"worker:1"))
    PlainExchange._send(SimpleNamespace(plain=head, body=[data]), connection)
    assert (length, data[body_at:]) == (102400, body)
    assert b"".join(written) == b"POST /x HTTP/1.1\r\nhost: worker:1\r\ncontent-length: 102400\r\n\r\n" + body
    assert isinstance(written[1], memoryview)


async def test_sessions_are_found_in_plain_requests(make_worker, make_router):
    workers = [await make_worker() for _ in range(3)]
    router = await make_router(*workers, policy="sticky")
    for _ in range(6):
        await router.post("/generate", b"{}", "X-SMG-Routing-Key: one", "accept: */*")
        await router.post("/generate", b"{}", "accept: */*", "x-smg-routing-key:  one ", "connection: keep-alive")
    assert sorted(len(worker.requests) for worker in workers) == [0, 0, 12]


async def test_a_plain_request_is_sent_again_when_its_worker_dies(make_worker, make_router):
    async def die(conversation):
        conversation.reset()

    workers = [await make_worker(die), await make_worker()]
    router = await make_router(*workers)
    answers = [await router.post("/generate", b"abc", "x-a: b") for _ in range(2)]
    assert [answer.body for answer in answers] == [b"abc"] * 2
    assert [request.header("x-a") for request in workers[1].requests] == ["b"] * 2
    await router.settled(2)
