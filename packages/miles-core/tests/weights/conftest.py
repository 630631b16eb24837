"""Fake engines: small HTTP servers that take weights as an engine does, and can be told to misbehave."""

from __future__ import annotations

import base64
import json
import mmap
import pickle
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
import xxhash
from safetensors.torch import load_file


class FakeEngine:
    def __init__(self) -> None:
        self.calls: list[str] = []
        self.answers: dict[str, dict[str, Any]] = {}
        self.payloads: dict[str, dict[str, Any]] = {}
        self.weights: dict[str, torch.Tensor] = {}
        self.version = ""
        self.refuses: set[str] = set()
        self.corrupts: set[str] = set()
        self.answers_like_sglang = False
        self.facts: dict[str, Any] = {"engine": "miles-embedded"}
        self.url = ""

    def handle(self, path: str, payload: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        self.calls.append(path)
        self.payloads[path] = payload
        if path in self.refuses:
            return 400, {"error": "refused"}
        if path in self.answers:
            return 200, self.answers[path]
        if path == "/update_weights_from_tensor":
            if self.answers_like_sglang:
                (layout,) = payload["serialized_named_tensors"]
                told = json.dumps({"checksums": self._take(pickle.loads(base64.b64decode(layout)))})
                return 200, {"success": True, "message": f"{told} Weight version updated to 7."}
            return 200, {"success": True, "checksums": self._take(payload["bucket"])}
        if path == "/update_weights_from_disk":
            for file in sorted(Path(payload["model_path"]).glob("*.safetensors")):
                self.weights |= load_file(file)
        if path == "/update_weight_version":
            self.version = payload["new_version"]
        return 200, {"success": True}

    def _take(self, bucket: dict[str, Any]) -> dict[str, str]:
        checksums, first = {}, 64 * (1 + bucket["num_readers"])
        with open(bucket["path"], "r+b") as file, mmap.mmap(file.fileno(), first + bucket["ring_bytes"]) as view:
            for spec in bucket["tensors"]:
                like = torch.empty(spec["shape"], dtype=getattr(torch, spec["dtype"]))
                _await(view, spec["offset"] + like.nbytes)
                data = bytearray(view[first + spec["offset"] : first + spec["offset"] + like.nbytes])
                if spec["name"] in self.corrupts:
                    data[0] ^= 1
                self.weights[spec["name"]] = torch.frombuffer(data, dtype=like.dtype).view(like.shape)
                checksums[spec["name"]] = xxhash.xxh3_64_hexdigest(data)
        return checksums


def _await(view: mmap.mmap, num_bytes: int) -> None:
    while (count := int.from_bytes(view[:8], "little", signed=True)) < num_bytes:
        if count < 0:
            raise RuntimeError("given up")
        time.sleep(0.001)


@contextmanager
def serving(engine: FakeEngine) -> Iterator[FakeEngine]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer(200, engine.facts)

        def do_POST(self) -> None:
            length = int(self.headers["Content-Length"])
            self._answer(*engine.handle(self.path, json.loads(self.rfile.read(length))))

        def _answer(self, status: int, answer: dict[str, Any]) -> None:
            body = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    engine.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield engine
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def engines() -> Iterator[list[FakeEngine]]:
    with ExitStack() as stack:
        yield [stack.enter_context(serving(FakeEngine())) for _ in range(2)]
