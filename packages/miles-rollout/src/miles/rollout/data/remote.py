"""Prompt data on web servers and on the Hugging Face Hub: a local copy, asked for at every start of a run."""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import re
import shutil
import tempfile
import urllib.error
import urllib.request
from pathlib import Path, PurePosixPath
from typing import IO
from urllib.parse import quote, urlsplit

from miles.core import environ
from miles.core.errors import DataError

HUB = "https://huggingface.co"
DEADLINE_S = 60.0
"""For every answer, not for a whole file."""
_ON_THE_HUB = re.compile(r"hf://datasets/(?P<name>[^/@]+/[^/@]+)(@(?P<revision>[^/]+))?/(?P<path>.+)")
_VALIDATORS = {"ETag": "If-None-Match", "Last-Modified": "If-Modified-Since"}
"""By what a server tells versions of a file apart, and how it is asked whether there is another one."""


def is_remote(text: str) -> bool:
    """Whether ``text`` is an address and no path."""
    return "://" in text


def fetch(url: str) -> Path:
    """A local copy of the file at ``url``: ``http://``, ``https://`` or ``hf://datasets/OWNER/NAME[@REVISION]/FILE``.

    It is downloaded unless the server says that the copy of an earlier run is what it has.  DataError names the address
    and what went wrong.
    """
    address = _address(url)
    suffix = PurePosixPath(urlsplit(address).path).suffix
    copy = environ.cache_dir() / "data" / f"{hashlib.sha256(address.encode()).hexdigest()[:24]}{suffix}"
    request = urllib.request.Request(address, headers=_conditions(copy))
    try:
        with urllib.request.urlopen(request, timeout=DEADLINE_S) as response:
            told = {name: response.headers[name] for name in _VALIDATORS if response.headers[name]}
            _write(copy, response, told, response.headers["Content-Length"])
    except urllib.error.HTTPError as error:
        if error.code != 304:  # not modified
            hint = ". Only public files are fetched: download it and give its path" if error.code in (401, 403) else ""
            raise DataError(f"{url}: the server answered {error.code} {error.reason}{hint}") from error
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise DataError(f"{url}: cannot be downloaded ({error}). Download it yourself and give its path") from error
    return copy


def _address(url: str) -> str:
    found = _ON_THE_HUB.fullmatch(url)
    if found is not None:
        revision = quote(found["revision"] or "main", safe="")
        return f"{HUB}/datasets/{found['name']}/resolve/{revision}/{quote(found['path'])}"
    if urlsplit(url).scheme not in ("http", "https"):
        raise DataError(f"{url}: expected http://, https:// or hf://datasets/OWNER/NAME[@REVISION]/FILE")
    return url


def _conditions(copy: Path) -> dict[str, str]:
    facts = _facts(copy)
    if not (copy.is_file() and facts.is_file()):
        return {}
    try:
        told = json.loads(facts.read_text(encoding="utf-8"))
    except ValueError:  # cut off by a kill
        return {}
    return {_VALIDATORS[name]: value for name, value in told.items()}


def _facts(copy: Path) -> Path:
    return copy.with_name(f"{copy.name}.json")


def _write(copy: Path, source: IO[bytes], told: dict[str, str], num_bytes: str | None) -> None:
    """The whole file or none: it is renamed when it is complete.  ``num_bytes``: of the file, if the server says so."""
    copy.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(prefix=f"{copy.name}.", dir=copy.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            shutil.copyfileobj(source, file)
            arrived = file.tell()
        if num_bytes is not None and arrived != int(num_bytes):  # a connection that ends early is no error by itself
            raise ValueError(f"{arrived} of {num_bytes} bytes arrived")
        _facts(copy).unlink(missing_ok=True)  # a copy without facts is downloaded again
        Path(partial).replace(copy)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise
    _facts(copy).write_text(json.dumps(told), encoding="utf-8")
