"""Engines in processes of their own that take weights from a process group.

``python group_engine.py`` forks one for each line that it reads, and writes its process id and its port.  The line says
what it does: ``obey``, refuse the path, ``corrupt`` what it got, or be ``late`` to note the group that it has joined.
"""

import json
import os
import signal
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch
import xxhash

from miles.core.weights import group as groups

mode = "obey"
joined = {}


def handle(path: str, body: dict) -> tuple[int, dict]:
    if path == mode:
        return 400, {"message": "refused"}
    if path == "/init_weights_update_group":
        where = body["master_address"], body["master_port"], body["world_size"]
        group = groups.join(
            groups.reach_store(*where, 60),
            name=body["group_name"],
            rank=body["rank_offset"],
            world_size=body["world_size"],
            backend=body["backend"],
            timeout_s=60,
        )
        if mode == "late":
            time.sleep(0.3)
        joined[body["group_name"]] = group
    if path == "/destroy_weights_update_group" and body["group_name"] in joined:
        groups.leave(joined.pop(body["group_name"]))
    if path == "/update_weights_from_distributed":
        return 200, {"success": True, "checksums": receive(body)}
    return 200, {"success": True}


def receive(body: dict) -> dict[str, str]:
    checksums = {}
    for name, dtype, shape in zip(body["names"], body["dtypes"], body["shapes"], strict=True):
        tensor = torch.empty(shape, dtype=getattr(torch, dtype))
        groups.broadcast(joined[body["group_name"]], tensor).wait()
        raw = tensor.reshape(-1).view(torch.uint8)
        checksums[name] = f"{xxhash.xxh3_64_intdigest(raw.numpy()) ^ (mode == 'corrupt'):016x}"
    return checksums


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.answer(200, {})

    def do_POST(self) -> None:
        self.answer(*handle(self.path, json.loads(self.rfile.read(int(self.headers["Content-Length"])))))

    def answer(self, status: int, value: dict) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


signal.signal(signal.SIGCHLD, signal.SIG_IGN)
for line in sys.stdin:
    if os.fork() == 0:
        mode = line.strip()
        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        sys.stdout.write(f"{os.getpid()} {server.server_port}\n")
        sys.stdout.flush()
        server.serve_forever()
