"""An engine in a process of its own that takes weights from a process group.

Run as ``python group_engine.py MODE``: it prints its port, and obeys, refuses ``MODE``, or corrupts what it got.
"""

import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch
import xxhash

from miles.core.weights import group as groups

MODE = sys.argv[1]
joined = {}


def handle(path: str, body: dict) -> tuple[int, dict]:
    if path == MODE:
        return 400, {"message": "refused"}
    if path == "/init_weights_update_group":
        where = body["master_address"], body["master_port"], body["world_size"]
        joined[body["group_name"]] = groups.join(
            groups.reach_store(*where, 20),
            name=body["group_name"],
            rank=body["rank_offset"],
            world_size=body["world_size"],
            backend=body["backend"],
            timeout_s=20,
        )
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
        checksums[name] = f"{xxhash.xxh3_64_intdigest(raw.numpy()) ^ (MODE == 'corrupt'):016x}"
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


server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
sys.stdout.write(f"{server.server_port}\n")
sys.stdout.flush()
server.serve_forever()
