"""Looking a head up means the same as reading it."""

from __future__ import annotations

import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from miles.router.framing import PLAIN_ANSWER
from miles.router.heads import HeadMemo
from miles.router.plain import PLAIN_REQUEST

LINES = st.sampled_from(
    [b"POST / HTTP/1.1\r\n", b"HTTP/1.1 200 OK\r\n", b"Host: x\r\n", b"Content-Length: ", b"content-length: ", b"\r",
     b"Content-Length:", b"X-Length: ", b"strength: 12\r\n", b"5\r\n", b"17\r\n", b"017\r\n", b"5 \r\n", b" 5\r\n",
     b"\n", b"a\r\n", b"-1\r\n", b"9" * 18 + b"\r\n", b"9" * 19 + b"\r\n", b"\r\n", b"\r\n\r\n", b"te: chunked\r\n"]
)  # fmt: skip
HEADS = st.lists(LINES, max_size=7).map(b"".join)
PREFIXES = st.sampled_from([b"", b"POST / HTTP/1.1\r\nHost: x\r\n", b"HTTP/1.1 200 OK\r\nserver: a\r\n"])
PATTERNS = [(PLAIN_REQUEST, 4), (PLAIN_ANSWER, 3)]


def read_by_pattern(pattern: re.Pattern[bytes], group: int, data: bytes) -> tuple[bytes, int, int] | None:
    match = pattern.match(data)
    return (what(match), int(match[group]), match.end()) if match else None


def what(match: re.Match[bytes]) -> bytes:
    return b"|".join(match.groups()[:2])


@given(st.lists(st.tuples(PREFIXES, HEADS).map(b"".join), min_size=1, max_size=6))
@example([b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 17\r\n\r\n"])
@example([b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 17\r\n\r"])
def test_heads_seen_before_change_nothing(heads):
    for pattern, group in PATTERNS:
        memo = HeadMemo(pattern, group, what)
        for data in [data for data in heads for _ in range(3)] * 2:  # unknown, known, and known to be the last
            assert memo.read(data) == read_by_pattern(pattern, group, data)


@pytest.mark.parametrize("length", [b"0", b"5", b"17", b"000", b"9" * 18])
def test_a_known_head_is_found_with_any_length(length):
    memo = HeadMemo(re.compile(rb"HTTP/1.1 200 OK\r\nlength: (\d+)\r\nx: y\r\n\r\n"), 1, lambda match: "read")
    assert memo.read(b"HTTP/1.1 200 OK\r\nlength: 3\r\nx: y\r\n\r\nabc") == ("read", 3, 36)
    memo._pattern = re.compile(b"never")
    head = b"HTTP/1.1 200 OK\r\nlength: %b\r\nx: y\r\n\r\n" % length
    assert memo.read(head + b"rest") == ("read", int(length), len(head))


def test_what_has_no_meaning_is_not_remembered():
    memo = HeadMemo(PLAIN_ANSWER, 3, lambda match: None)
    assert memo.read(b"HTTP/1.1 204 No Content\r\nContent-Length: 0\r\n\r\n") is None
    assert not memo._known


def test_few_and_short_heads_are_remembered():
    memo = HeadMemo(PLAIN_ANSWER, 3, lambda match: int(match[2]))
    for number in range(3000):
        head = b"HTTP/1.1 200 OK\r\nx: %d\r\nContent-Length: 5\r\n\r\n" % number
        assert memo.read(head) == (200, 5, len(head))
    assert 0 < len(memo._known) <= 1024
    known = len(memo._known)
    long = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nx: %b\r\n\r\n" % (b"y" * 5000)
    assert memo.read(long) == (200, 5, len(long))
    assert len(memo._known) == known
