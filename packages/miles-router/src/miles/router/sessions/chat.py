"""OpenAI chat completions on one side, the engine's ``/generate`` with token ids on the other."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from miles.core.continuation import Message
from miles.router.sessions.messages import read_messages
from miles.router.sessions.speech import Listener
from miles.router.sessions.trajectory import Generation
from miles.router.tokenizer import CheckpointTokenizer

_RENAMED = {
    "max_tokens": "max_new_tokens",
    "max_completion_tokens": "max_new_tokens",
    "min_tokens": "min_new_tokens",
    "seed": "sampling_seed",
}
_SAME = frozenset((
    "temperature", "top_p", "top_k", "min_p", "stop", "stop_token_ids", "stop_regex", "ignore_eos",
    "frequency_penalty", "presence_penalty", "repetition_penalty", "logit_bias", "custom_params",
    "json_schema", "regex", "ebnf", "structural_tag",
))  # fmt: skip
_TO_ENGINE = frozenset(("lora_path", "custom_logit_processor", "priority", "rid"))
_READ = frozenset((
    "messages", "tools", "tool_choice", "stream", "stream_options", "logprobs", "top_logprobs", "n", "model",
    "chat_template_kwargs", "response_format",
))  # fmt: skip
_WITHOUT_EFFECT = frozenset((
    "user", "metadata", "store", "parallel_tool_calls", "service_tier", "safety_identifier", "prompt_cache_key",
    "skip_special_tokens", "no_stop_trim", "return_meta_info", "return_routed_experts", "spaces_between_special_tokens",
))  # fmt: skip
"""Hints that change no token, and what sessions decide themselves."""


class BadRequestError(ValueError):
    """A field of a request cannot be served.  Names it."""


class BadAnswerError(ValueError):
    """An engine's answer lacks what a session needs.  Says what."""


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """A parsed body."""

    messages: list[Message]
    tools: list[Any] | None
    variables: dict[str, Any]
    """Of the chat tokenizer, this request's own."""
    sampling: dict[str, Any]
    engine_fields: dict[str, Any] = field(default_factory=dict)
    model: str = ""
    stream: bool = False
    include_usage: bool = False
    logprobs: bool = False
    top_logprobs: int = 0

    def payload(self, ids: list[int], *, routed_experts: bool) -> dict[str, Any]:
        """Body of ``/generate``."""
        body: dict[str, Any] = {"input_ids": ids, "sampling_params": self.sampling, "return_logprob": True}
        if self.top_logprobs:
            body["top_logprobs_num"] = self.top_logprobs
        if routed_experts:
            body["return_routed_experts"] = True
        return body | self.engine_fields


def read_chat(body: Any) -> ChatRequest:
    """Parse a body; raises BadRequestError or BadMessageError."""
    if not isinstance(body, Mapping):
        raise BadRequestError("the body must be a JSON object")
    messages = read_messages(body.get("messages"))
    given = {name: value for name, value in body.items() if value is not None}
    unknown = sorted(given.keys() - _READ - _SAME - _RENAMED.keys() - _TO_ENGINE - _WITHOUT_EFFECT)
    if unknown:
        raise BadRequestError(f"sessions do not support {', '.join(map(repr, unknown))}")
    if given.get("n", 1) != 1:
        raise BadRequestError(f"n is {given['n']}: a session is one line of turns; open several sessions instead")
    choice = given.get("tool_choice", "auto")
    if choice not in ("auto", "none"):
        raise BadRequestError(f"tool_choice {choice!r} is not supported: expected 'auto' or 'none'")
    sampling = {_RENAMED.get(name, name): value for name, value in given.items() if name in _RENAMED or name in _SAME}
    options = given.get("stream_options") or {}
    return ChatRequest(
        messages=messages,
        tools=(given.get("tools") or None) if choice == "auto" else None,
        variables=dict(given.get("chat_template_kwargs") or {}),
        sampling=sampling | _grammar(given.get("response_format")),
        engine_fields={name: value for name, value in given.items() if name in _TO_ENGINE},
        model=str(given.get("model", "")),
        stream=bool(given.get("stream")),
        include_usage=bool(options.get("include_usage")),
        logprobs=bool(given.get("logprobs")),
        top_logprobs=int(given.get("top_logprobs") or 0),
    )


def _grammar(response_format: Any) -> dict[str, Any]:
    if response_format is None or response_format.get("type") == "text":
        return {}
    if response_format.get("type") == "json_schema":
        return {"json_schema": json.dumps(response_format["json_schema"].get("schema", {}))}
    if response_format.get("type") == "json_object":
        return {"json_schema": '{"type": "object"}'}
    raise BadRequestError(f"response_format {response_format!r}: expected type text, json_object or json_schema")


def read_generation(answer: Any) -> Generation:
    """What was sampled, from an answer of ``/generate``; raises BadAnswerError."""
    meta = answer.get("meta_info") if isinstance(answer, Mapping) else None
    if not isinstance(meta, Mapping) or "output_token_logprobs" not in meta:
        raise BadAnswerError("the engine's answer has no meta_info.output_token_logprobs")
    sampled = meta["output_token_logprobs"]
    output = [int(entry[1]) for entry in sampled]
    if meta.get("completion_tokens", len(output)) != len(output):
        raise BadAnswerError(f"the engine sampled {meta['completion_tokens']} tokens but names {len(output)}")
    finish = (meta.get("finish_reason") or {}).get("type")
    if finish not in ("stop", "length", "abort"):
        raise BadAnswerError(f"the engine's finish_reason is {finish!r}: expected stop, length or abort")
    versions, token_versions = _versions(meta, len(output))
    return Generation(
        output=output,
        logps=[float(entry[0]) for entry in sampled],
        finish=finish,
        versions=versions,
        token_versions=token_versions,
        cached_tokens=int(meta.get("cached_tokens") or 0),
        routed_experts=meta.get("routed_experts"),
    )


def _versions(meta: Mapping[str, Any], count: int) -> tuple[list[str], list[int] | None]:
    """Weight versions that took part, and the one of each token.  Spans ``[start, end)`` count output tokens."""
    spans = meta.get("weight_versions")
    if spans and all(isinstance(span, Mapping) and "version" in span for span in spans):
        named = [(str(span["version"]), int(span["start"]), int(span["end"])) for span in spans]
    elif meta.get("weight_version") is not None:
        named = [(str(meta["weight_version"]), 0, count)]
    else:
        return [], None
    versions = [version for version, _, _ in named]
    if not all(version.isdecimal() for version in versions) or sum(end - start for _, start, end in named) != count:
        return versions, None
    return versions, [int(version) for version, start, end in named for _ in range(end - start)]


def make_reply(
    tokenizer: CheckpointTokenizer,
    listener: Listener,
    request: ChatRequest,
    prompt_ids: list[int],
    answer: Mapping[str, Any],
    generation: Generation,
) -> Message:
    """The assistant's message, in the form that templates take (arguments as objects)."""
    spoken = listener(_spoken_text(tokenizer, prompt_ids, answer, generation), request.tools)
    reply: Message = {"role": "assistant", "content": tokenizer.without_specials(spoken.words)}
    if spoken.reasoning is not None:
        reply["reasoning_content"] = spoken.reasoning
    if spoken.calls:
        reply["tool_calls"] = [
            {
                "id": f"call_{uuid.uuid4().hex[:24]}",
                "type": "function",
                "function": {"name": call.name, "arguments": call.arguments},
            }
            for call in spoken.calls
        ]
    return reply


def _spoken_text(
    tokenizer: CheckpointTokenizer, prompt_ids: list[int], answer: Mapping[str, Any], generation: Generation
) -> str:
    """Text of the answer, with special tokens, up to what stopped it."""
    ids = generation.output
    matched = (answer["meta_info"].get("finish_reason") or {}).get("matched")
    if generation.finish == "stop" and ids and (ids[-1] == matched or ids[-1] in tokenizer.special_ids):
        ids = ids[:-1]
    text = tokenizer.decode_after(prompt_ids, ids)
    if isinstance(matched, str) and matched in text:
        text = text[: text.rindex(matched)]
    return text


def completion(
    request: ChatRequest, reply: Message, generation: Generation, num_prompt_tokens: int, logprobs: Any
) -> dict[str, Any]:
    """The body of an answer."""
    message: Message = {"role": "assistant", "content": reply["content"] or None} | {
        name: reply[name] for name in ("reasoning_content",) if name in reply
    }
    if reply.get("tool_calls"):
        message["tool_calls"] = [_wire_call(call) for call in reply["tool_calls"]]
    else:
        message["content"] = reply["content"]
    finish = "tool_calls" if reply.get("tool_calls") and generation.finish == "stop" else generation.finish
    num_output = len(generation.output)
    return {
        "id": f"chatcmpl-{uuid.uuid4().hex}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": request.model,
        "choices": [{"index": 0, "message": message, "logprobs": logprobs, "finish_reason": finish}],
        "usage": {
            "prompt_tokens": num_prompt_tokens,
            "completion_tokens": num_output,
            "total_tokens": num_prompt_tokens + num_output,
            "prompt_tokens_details": {"cached_tokens": generation.cached_tokens},
        },
    }


def _wire_call(call: dict[str, Any]) -> dict[str, Any]:
    function = call["function"]
    arguments = json.dumps(function["arguments"], ensure_ascii=False)
    return call | {"function": {"name": function["name"], "arguments": arguments}}


def openai_logprobs(tokenizer: CheckpointTokenizer, answer: Mapping[str, Any]) -> dict[str, Any]:
    """``choices[].logprobs`` from the engine's triples of log-probability, id and text."""
    meta = answer["meta_info"]
    sampled = meta["output_token_logprobs"]
    tops = meta.get("output_top_logprobs") or [[]] * len(sampled)

    def entry(triple: Any) -> dict[str, Any]:
        text = tokenizer.decode([int(triple[1])])
        return {"token": text, "logprob": triple[0], "bytes": list(text.encode())}

    content = [entry(one) | {"top_logprobs": [entry(top) for top in several]} for one, several in zip(sampled, tops)]
    return {"content": content}


def stream_events(answer: dict[str, Any], *, include_usage: bool) -> Iterator[bytes]:
    """A whole answer as server-sent events, for clients that want a stream."""
    choice = answer["choices"][0]
    delta = dict(choice["message"])
    if "tool_calls" in delta:
        delta["tool_calls"] = [{"index": index} | call for index, call in enumerate(delta["tool_calls"])]
    head = {name: answer[name] for name in ("id", "created", "model")} | {"object": "chat.completion.chunk"}
    yield _event(head, [{"index": 0, "delta": delta, "logprobs": choice["logprobs"], "finish_reason": None}])
    yield _event(head, [{"index": 0, "delta": {}, "finish_reason": choice["finish_reason"]}])
    if include_usage:
        yield _event(head | {"usage": answer["usage"]}, [])
    yield b"data: [DONE]\n\n"


def _event(head: dict[str, Any], choices: list[Any]) -> bytes:
    return b"data: " + json.dumps(head | {"choices": choices}, ensure_ascii=False).encode() + b"\n\n"
