"""Downloads from a real server on this machine."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from miles.core.errors import DataError
from miles.rollout.data import open_rows, parse_paths, remote


class Site(ThreadingHTTPServer):
    """Serves ``content`` under every path but ``/gone`` and ``/private``, and notes what it answered."""

    content = b'{"input": "1"}\n{"input": "2"}\n'
    tag: str | None = '"a"'
    missing = 0
    """Bytes that are promised and do not come."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Page)
        self.answered: list[tuple[str, int]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Page(BaseHTTPRequestHandler):
    server: Site

    def do_GET(self) -> None:
        known = self.server.tag is not None and self.headers.get("If-None-Match") == self.server.tag
        status = {"/gone": 404, "/private": 401}.get(self.path, 304 if known else 200)
        self.server.answered.append((self.path, status))
        self.send_response(status)
        if self.server.tag is not None:
            self.send_header("ETag", self.server.tag)
        body = self.server.content if status == 200 else b""
        self.send_header("Content-Length", str(len(body) + self.server.missing))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def site(tmp_path, monkeypatch) -> Iterator[Site]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with Site() as site:
        threading.Thread(target=site.serve_forever, args=(0.01,), daemon=True).start()
        yield site
        site.shutdown()


def inputs(text: str) -> list[str]:
    (source,) = parse_paths(text)
    rows = open_rows(source, {"input"})
    return [rows[index]["input"] for index in range(len(rows))]


def test_rows_of_an_address_are_read_and_sliced(site):
    assert inputs(f"{site.url}/train.jsonl") == ["1", "2"]
    assert inputs(f"{site.url}/train.jsonl@[1:]") == ["2"]


def test_a_copy_is_used_as_long_as_the_server_has_the_same(site):
    remote.fetch(f"{site.url}/train.jsonl")
    remote.fetch(f"{site.url}/train.jsonl")
    site.content, site.tag = b'{"input": "3"}\n', '"b"'
    assert inputs(f"{site.url}/train.jsonl") == ["3"]
    assert [status for _, status in site.answered] == [200, 304, 200]


def test_a_server_that_tells_no_versions_is_asked_again(site):
    site.tag = None
    remote.fetch(f"{site.url}/train.jsonl")
    remote.fetch(f"{site.url}/train.jsonl")
    assert [status for _, status in site.answered] == [200, 200]


def test_files_on_the_hub_have_addresses_of_their_own(site, monkeypatch):
    monkeypatch.setattr(remote, "HUB", site.url)
    assert inputs("hf://datasets/open/sums/data/train.jsonl@[:1]") == ["1"]
    remote.fetch("hf://datasets/open/sums@v1.0/train.jsonl")
    assert [path for path, _ in site.answered] == [
        "/datasets/open/sums/resolve/main/data/train.jsonl",
        "/datasets/open/sums/resolve/v1.0/train.jsonl",
    ]


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("http://127.0.0.1:9/train.jsonl", "cannot be downloaded"),
        ("{site}/gone", "answered 404"),
        ("{site}/private", "answered 401 Unauthorized. Only public files are fetched"),
        ("s3://bucket/train.jsonl", "expected http://, https:// or hf://datasets"),
        ("hf://sums/train.jsonl", "expected http://"),
    ],
)
def test_what_cannot_be_had_is_named(site, url, problem):
    url = url.format(site=site.url)
    with pytest.raises(DataError, match=problem) as error:
        remote.fetch(url)
    assert str(error.value).startswith(url)


def test_a_download_that_breaks_off_is_no_copy(site):
    site.missing = 10
    with pytest.raises(DataError, match="30 of 40 bytes arrived"):
        remote.fetch(f"{site.url}/train.jsonl")
    site.missing = 0
    assert inputs(f"{site.url}/train.jsonl") == ["1", "2"]


def test_a_server_that_speaks_something_else_is_named(site, monkeypatch):
    monkeypatch.setattr(Page, "do_GET", lambda page: page.wfile.write(b"hello\r\n"))
    with pytest.raises(DataError, match="cannot be downloaded"):
        remote.fetch(f"{site.url}/train.jsonl")


def test_notes_about_a_copy_that_were_cut_off_are_made_again(site):
    copy = remote.fetch(f"{site.url}/train.jsonl")
    (notes,) = copy.parent.glob("*.json")
    notes.write_text(notes.read_text()[:5])
    assert inputs(f"{site.url}/train.jsonl") == ["1", "2"]
    assert [status for _, status in site.answered] == [200, 200]
