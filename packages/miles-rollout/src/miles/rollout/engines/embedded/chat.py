"""``/v1/chat/completions``: OpenAI's form over the same generation."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from miles.rollout.engines.embedded.engine import Engine
from miles.rollout.engines.embedded.protocol import BadRequest, GenerateItem, parse_sampling_params
from miles.rollout.engines.embedded.sampling import SamplingParams
from miles.rollout.engines.embedded.sequence import Progress

_RENAMED = {
    "max_tokens": "max_new_tokens",
    "max_completion_tokens": "max_new_tokens",
    "min_tokens": "min_new_tokens",
    "seed": "sampling_seed",
}
_SAME = {
    "temperature", "top_p", "top_k", "min_p", "n", "stop", "stop_token_ids", "ignore_eos", "skip_special_tokens",
    "no_stop_trim", "frequency_penalty", "presence_penalty", "repetition_penalty",
}  # fmt: skip
_READ = {
    "model", "messages", "tools", "stream", "logprobs", "top_logprobs", "chat_template_kwargs", "rid", "user",
    "stream_options",
}  # fmt: skip
_HARMLESS = {"tool_choice": (None, "auto", "none"), "response_format": (None, {"type": "text"}), "store": (None, False)}


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """A parsed body."""

    conversation: tuple[list[dict[str, Any]], list[dict[str, Any]] | None, dict[str, Any]]
    """Messages, tools, and variables of the template."""
    params: SamplingParams
    rid: str | None
    stream: bool
    logprobs: bool
    top_logprobs: int

    def item(self, prompt: list[int]) -> GenerateItem:
        """The generation it asks for."""
        return GenerateItem(
            rid=self.rid,
            text=None,
            input_ids=prompt,
            params=self.params,
            return_logprob=self.logprobs,
            top_logprobs_num=self.top_logprobs,
        )


def parse_chat(body: Mapping[str, Any], engine: Engine) -> ChatRequest:
    """Parse a body; raise BadRequest naming the field."""
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) for m in messages):
        raise BadRequest("messages must be a list of messages")
    params: dict[str, Any] = {}
    for name, value in body.items():
        if name in _RENAMED:
            params[_RENAMED[name]] = value
        elif name in _SAME:
            params[name] = value
        elif name in _HARMLESS:
            if value not in _HARMLESS[name]:
                raise BadRequest(f"the embedded engine does not support {name}={value!r}")
        elif name not in _READ:
            raise BadRequest(f"the embedded engine does not support {name}")
    stream = bool(body.get("stream"))
    parsed = parse_sampling_params(params)
    if stream and parsed.n > 1:
        raise BadRequest("stream is for n=1")
    tools = None if body.get("tool_choice") == "none" else body.get("tools")
    return ChatRequest(
        conversation=(messages, tools, dict(body.get("chat_template_kwargs") or {})),
        params=parsed,
        rid=body.get("rid"),
        stream=stream,
        logprobs=bool(body.get("logprobs")),
        top_logprobs=int(body.get("top_logprobs") or 0),
    )


class ChatAnswer:
    """Renders progress in OpenAI's form."""

    def __init__(self, engine: Engine, request: ChatRequest) -> None:
        self._engine = engine
        self._request = request
        self._shown = 0
        self._created = int(time.time())

    def whole(self, finals: list[Progress]) -> dict[str, Any]:
        """The body of an answer that is not streamed."""
        prompt_tokens = len(finals[0].sequence.prompt)
        completion_tokens = sum(len(final.tokens) for final in finals)
        choices = []
        for index, final in enumerate(finals):
            message = {"role": "assistant", "content": self._text(final), "tool_calls": None}
            logprobs = {"content": self._logprobs(final)} if self._request.logprobs else None
            choices.append(
                {
                    "index": index,
                    "message": message,
                    "logprobs": logprobs,
                    **self._finish(final),
                    "meta_info": self._meta(final),
                }
            )
        return {
            **self._head(finals[0], "chat.completion"),
            "choices": choices,
            "usage": {
                "prompt_tokens": prompt_tokens,
                "completion_tokens": completion_tokens,
                "total_tokens": prompt_tokens + completion_tokens,
            },
        }

    def chunks(self, progress: Progress) -> Iterator[dict[str, Any]]:
        """Streamed pieces: text that is certain by now."""
        text = self._text(progress)
        if progress.finish is None:
            # What may become a stop string or another character is held back.
            held = max((len(stop) for stop in self._request.params.stop), default=1) - 1
            text = (
                text[: len(text) - held].removesuffix("\N{REPLACEMENT CHARACTER}")
                if held
                else text.removesuffix("\N{REPLACEMENT CHARACTER}")
            )
        delta: dict[str, Any] = {"content": text[self._shown :]}
        if self._shown == 0:
            delta["role"] = "assistant"
        if len(text) > self._shown or progress.finish is not None:
            self._shown = max(self._shown, len(text))
            choice = {"index": 0, "delta": delta, **self._finish(progress)}
            yield {**self._head(progress, "chat.completion.chunk"), "choices": [choice]}

    def _head(self, progress: Progress, kind: str) -> dict[str, Any]:
        return {"id": progress.sequence.rid, "object": kind, "created": self._created, "model": self._engine.name}

    def _text(self, progress: Progress) -> str:
        return self._engine.response_text(progress) or ""

    @staticmethod
    def _finish(progress: Progress) -> dict[str, Any]:
        finish = progress.finish or {"type": None}
        return {"finish_reason": finish["type"], "matched_stop": finish.get("matched")}

    @staticmethod
    def _meta(progress: Progress) -> dict[str, Any]:
        return {"weight_version": progress.versions[-1][0], "output_ids": progress.tokens}

    def _logprobs(self, progress: Progress) -> list[dict[str, Any]]:
        tops = progress.sequence.top_logps or [[] for _ in progress.tokens]
        return [
            {**self._token(token, logp), "top_logprobs": [self._token(other, value) for value, other in top]}
            for token, logp, top in zip(progress.tokens, progress.logps, tops, strict=True)
        ]

    def _token(self, token: int, logp: float) -> dict[str, Any]:
        text = self._engine.text.decode([token], skip_special_tokens=False)
        return {"token": text, "token_id": token, "logprob": logp, "bytes": list(text.encode())}
