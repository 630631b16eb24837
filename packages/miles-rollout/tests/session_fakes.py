"""A router's sessions in brief: records what its scripted model said, and hands it out as safetensors."""

from __future__ import annotations

from typing import Any

import numpy as np
import orjson
from aiohttp import web
from safetensors.numpy import save
from served_app import ServedApp

PROMPT_IDS = [10, 11, 12]


class FakeSessions(ServedApp):
    """Every turn is answered with the text ``turn N`` and two tokens; a turn adds one token of the agent's."""

    def __init__(self) -> None:
        super().__init__()
        self.turns: dict[str, int] = {}
        self.deleted: list[str] = []
        self.requests: list[dict[str, Any]] = []
        self.limits: list[int | None] = []
        self.offered = True
        self.experts = False
        self.status = "completed"
        self.app.router.add_post("/sessions", self._open)
        self.app.router.add_post("/sessions/{id}/v1/chat/completions", self._chat)
        self.app.router.add_post("/sessions/{id}/samples", self._samples)
        self.app.router.add_delete("/sessions/{id}", self._delete)

    async def _open(self, request: web.Request) -> web.Response:
        if not self.offered:
            return web.Response(status=404, text="no sessions here")
        name = f"s{len(self.turns)}"
        self.turns[name] = 0
        return web.json_response({"session_id": name})

    async def _chat(self, request: web.Request) -> web.Response:
        name = request.match_info["id"]
        self.requests.append(await request.json())
        self.turns[name] += 1
        message = {"role": "assistant", "content": f"turn {self.turns[name]}"}
        return web.json_response({"choices": [{"message": message, "finish_reason": "stop"}]})

    async def _samples(self, request: web.Request) -> web.Response:
        self.limits.append((await request.json())["max_seq_len"])
        turns = self.turns[request.match_info["id"]]
        meta: list[dict[str, Any]] = []
        tensors: dict[str, Any] = {}
        if turns:
            mask = ([1, 1, 0] * turns)[:-1]
            tokens = PROMPT_IDS + list(range(20, 20 + len(mask)))
            tensors = {
                "tokens.0": np.array(tokens, np.int64),
                "loss_mask.0": np.array(mask, np.uint8),
                "rollout_log_probs.0": np.array([-0.1 / 3 * on for on in mask], np.float64),
                "token_weight_versions.0": np.array([4] * len(mask), np.int64),
            }
            if self.experts:
                tensors["rollout_routed_experts.0"] = np.arange((len(tokens) - 1) * 6, dtype=np.int32).reshape(-1, 6)
            cache = {"cached_tokens": 1, "prompt_tokens": 5}
            meta = [
                {
                    "status": self.status,
                    "response": "said",
                    "response_length": len(mask),
                    "weight_versions": ["4"] * turns,
                    "prefix_cache_info": cache,
                    "metadata": {"num_turns": turns},
                }
            ]
        tensors["_samples_meta"] = np.frombuffer(orjson.dumps(meta), np.uint8)
        return web.Response(body=save(tensors), content_type="application/octet-stream")

    async def _delete(self, request: web.Request) -> web.Response:
        self.deleted.append(request.match_info["id"])
        return web.Response(status=204)
