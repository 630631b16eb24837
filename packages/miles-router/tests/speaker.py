"""A worker's model that says what it is told to, as tokens."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from miles.router.tokenizer import CheckpointTokenizer


@dataclass
class Speaker:
    """What a worker's model says, one text after the other; the last one again and again."""

    tokenizer: CheckpointTokenizer
    end: str
    texts: list[str]
    finish: str = "stop"
    version: Any = "3"
    extra: dict[str, Any] = field(default_factory=dict)
    prompts: list[list[int]] = field(default_factory=list)
    bodies: list[dict[str, Any]] = field(default_factory=list)

    async def __call__(self, conversation: Any) -> None:
        body = conversation.request.json()
        self.bodies.append(body)
        self.prompts.append(body.get("input_ids"))
        await conversation.answer(json.dumps(self.answer(body)).encode())

    def answer(self, body: dict[str, Any]) -> dict[str, Any]:
        text = self.texts.pop(0) if len(self.texts) > 1 else self.texts[0]
        ids = self.tokenizer.encode(text + (self.end if self.finish == "stop" else ""))
        finish: dict[str, Any] = {"type": self.finish}
        if self.finish == "stop":
            finish["matched"] = ids[-1]
        meta = {
            "finish_reason": finish,
            "completion_tokens": len(ids),
            "output_token_logprobs": [[-0.5 - n, token, None] for n, token in enumerate(ids)],
            "weight_version": self.version,
            "cached_tokens": 2,
        }
        return {"text": text, "output_ids": ids, "meta_info": meta | self.extra}
