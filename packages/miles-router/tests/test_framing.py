"""Reading a worker's framing: the same however its bytes are cut, and strict."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from miles.router import framing
from miles.router.framing import BadResponseError, ChunkScanner, connection_options, read_response_head


def head(*lines: str) -> bytes:
    return "\r\n".join(["HTTP/1.1 200 OK", *lines, "\r\n"]).encode("latin-1")


def chunked(pieces: list[bytes], trailers: bytes = b"") -> bytes:
    return b"".join(b"%x;e=1\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n" + trailers + b"\r\n"


def test_a_plain_head_is_forwarded_as_it_is():
    raw = head("Date: now", "Content-Length: 12", "Content-Type: text/plain")
    found, end = read_response_head(raw + b"hello")
    assert (found.raw, end) == (raw, len(raw))
    assert (found.status, found.length, found.chunked, found.keep_alive, found.plain) == (200, 12, False, True, True)


def test_an_unfinished_head_is_waited_for():
    raw = head("content-length: 1")
    assert all(read_response_head(raw[:cut]) is None for cut in range(len(raw)))


def test_an_endless_head_is_an_error():
    with pytest.raises(BadResponseError, match="above"):
        read_response_head(b"HTTP/1.1 200 OK\r\nx: " + b"y" * framing.MAX_HEAD_BYTES)


@pytest.mark.parametrize(
    ("lines", "bodiless", "expected"),
    [
        (["content-length: 5"], True, (0, False, True, True)),
        (["transfer-encoding: chunked"], False, (None, True, True, True)),
        (["Transfer-Encoding:  Chunked "], False, (None, True, True, True)),
        ([], False, (None, False, False, False)),
        (["connection: close", "content-length: 5"], False, (5, False, False, False)),
        (["connection: keep-alive", "content-length: 5"], False, (5, False, True, False)),
        (["keep-alive: timeout=5", "content-length: 5"], False, (5, False, True, False)),
    ],
)
def test_the_end_of_the_body_follows_from_the_head(lines, bodiless, expected):
    found, _ = read_response_head(head(*lines), bodiless)
    assert (found.length, found.chunked, found.keep_alive, found.plain) == expected


@pytest.mark.parametrize("status", [100, 204, 304])
def test_some_statuses_have_no_body(status):
    found, _ = read_response_head(head("content-length: 5").replace(b"200", b"%d" % status))
    assert found.length == 0


def test_an_old_worker_does_not_keep_its_connection():
    found, _ = read_response_head(b"HTTP/1.0 200 OK\r\ncontent-length: 5\r\n\r\n")
    assert (found.length, found.keep_alive, found.plain) == (5, False, False)
    assert found.forwarded() == b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\n"


def test_a_rewritten_head_loses_only_what_concerns_the_connection():
    raw = head("Connection: x-mine, content-length", "X-Mine: 1", "Keep-Alive: 5", "Content-Length: 3", "X-A:  b c ")
    found, _ = read_response_head(raw)
    assert found.forwarded([b"x-b: 1"], without=b"x-a") == head("content-length: 3", "x-b: 1")
    assert found.headers() == [(b"content-length", b"3"), (b"x-a", b"b c")]


def test_connection_options_are_collected_from_every_line():
    named = connection_options([(b"connection", b"A, b"), (b"x", b"y"), (b"connection", b"transfer-encoding")])
    assert {b"a", b"b", b"te"} <= named
    assert b"transfer-encoding" not in named


@pytest.mark.parametrize(
    "raw",
    [
        b"HTTP/2.0 200 OK\r\n\r\n",
        b"HTTP/1.1 20 OK\r\n\r\n",
        b"HTTP/1.1 600 OK\r\n\r\n",
        b"HTTP/1.1  200 OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n name: folded\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nname : v\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nname: a\rb\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nname: a\0b\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: 1\r\nContent-Length: 1\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: 0x10\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length:\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: 9999999999999999999\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\ntransfer-encoding: chunked\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked, gzip\r\n\r\n",
    ],
)
def test_a_malformed_head_is_an_error(raw):
    with pytest.raises(BadResponseError):
        read_response_head(raw)


TOKENS = st.sampled_from(
    [
        "Content-Length",
        "content-length",
        "X-A",
        "Transfer-Encoding",
        "Connection",
        "TE",
        "te-x",
        "upgrade",
        "date",
        "x!",
    ]
)
VALUES = st.sampled_from(["5", " 5 ", "chunked", "close", "keep-alive", "x, y", "", "17", "a:b", "5 5"])


@given(st.lists(st.tuples(TOKENS, VALUES), max_size=6), st.sampled_from(["200", "204", "404", "304"]), st.booleans())
def test_the_short_cut_for_plain_heads_agrees_with_the_full_parse(fields, status, bodiless):
    raw = head(*(f"{name}:{value}" for name, value in fields)).replace(b"200", status.encode())
    full = outcome(lambda: framing._parse_head(raw, bodiless))
    found = outcome(lambda: read_response_head(raw, bodiless)[0])
    assert found == full


def outcome(parse):
    try:
        found = parse()
    except BadResponseError:
        return "bad"
    return found.status, found.length, found.chunked, found.keep_alive, found.plain, found.raw


@given(st.lists(st.binary(min_size=1, max_size=40), max_size=6), st.booleans(), st.data())
def test_chunks_end_at_the_same_byte_however_they_are_cut(pieces, with_trailer, data):
    wire = chunked(pieces, b"x-sum: 1\r\n" if with_trailer else b"")
    stream = wire + b"HTTP/1.1"
    scanner, payload, used, at = ChunkScanner(), [], 0, 0
    while at < len(stream) and not scanner.done:
        size = data.draw(st.integers(1, len(stream) - at))
        used += scanner.feed(stream[at : at + size], payload)
        at += size
    assert scanner.done
    assert used == len(wire)
    assert b"".join(payload) == b"".join(pieces)


@pytest.mark.parametrize(
    "wire",
    [b"5\nhello", b"xyz\r\n", b"-1\r\n", b"0x5\r\n", b"2\r\nabc\r\n", b"5 5\r\n", b"\r\n", b"f" * 20 + b"\r\n"],
)
def test_a_broken_chunk_is_an_error(wire):
    with pytest.raises(BadResponseError):
        ChunkScanner().feed(wire + b"\r\n\r\n")


def test_an_endless_chunk_line_is_an_error():
    scanner = ChunkScanner()
    assert scanner.feed(b"1" * 16_000) == 16_000
    with pytest.raises(BadResponseError, match="too long"):
        scanner.feed(b"1" * 1000)
