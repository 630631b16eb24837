"""An engine for tests of where engines run: ``GET /anything`` answers what it was started with, and what it sees."""

from __future__ import annotations

import json
import os
import sys
import urllib.request
from dataclasses import asdict, dataclass, replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

from miles.core.errors import EngineError
from miles.core.process import ChildProcess
from miles.core.protocols.engine import EngineSpec


@dataclass(frozen=True)
class ListeningEngine:
    url: str
    process: ChildProcess

    def wait_ready(self, deadline_s: float) -> None:
        self.process.wait_ready(f"{self.url}/health_generate", deadline_s)

    def alive(self) -> bool:
        return self.process.alive()

    def describe_end(self) -> str:
        return self.process.describe_end()

    def stop(self, deadline_s: float = 10.0) -> None:
        self.process.stop(deadline_s)


class Launcher:
    """Named ``listening_engine:Launcher`` where this directory is on the path."""

    def launch(self, spec: EngineSpec) -> ListeningEngine:
        if "refuses" in spec.options:
            raise EngineError("it refuses")
        told = json.dumps(asdict(replace(spec, log_path=None)))
        process = ChildProcess([sys.executable, __file__, told], log_path=spec.log_path, name=f"engine {spec.index}")
        return ListeningEngine(f"http://{spec.host}:{spec.port}", process)

    def check(self, options: dict[str, Any]) -> list[str]:
        return []


def ask(url: str) -> dict[str, Any]:
    with urllib.request.urlopen(url, timeout=10) as response:
        told: dict[str, Any] = json.load(response)
    return told


def _serve(spec: dict[str, Any]) -> None:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = {"spec": spec, "pid": os.getpid(), "devices": os.environ.get("CUDA_VISIBLE_DEVICES")}
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(body).encode())

    sys.stdout.write("about to listen\n")
    sys.stdout.flush()
    if "fails" in spec["options"]:
        raise SystemExit("it cannot listen")
    HTTPServer((spec["host"], spec["port"]), Handler).serve_forever()


if __name__ == "__main__":
    _serve(json.loads(sys.argv[1]))
