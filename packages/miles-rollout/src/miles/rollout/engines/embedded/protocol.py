"""``/generate`` on the wire: from JSON to sequences, and from progress to JSON.

Fields and defaults are SGLang's.  What this engine does not do is refused, never ignored.
"""

from __future__ import annotations

import base64
import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from miles.core.errors import MilesError
from miles.rollout.engines.embedded.sampling import SamplingParams
from miles.rollout.engines.embedded.sequence import Progress

TopLogps = list[tuple[float, int]]

_IGNORED_FIELDS = frozenset(
    {
        "log_metrics",
        "routing_key",
        "priority",
        "session_id",
        "session_params",
        "extra_key",
        "return_text_in_logprobs",
        "data_parallel_rank",
        "routed_dp_rank",
        "modalities",
        "received_time",
        "background",
        "model",
        "user",
    }
)
"""Hints that change no result."""
_READ_FIELDS = frozenset(
    {
        "text",
        "input_ids",
        "sampling_params",
        "rid",
        "stream",
        "return_logprob",
        "logprob_start_len",
        "top_logprobs_num",
        "return_routed_experts",
    }
)
_UNSUPPORTED_FIELDS = {
    "input_embeds": "it takes text or token ids",
    "image_data": "it serves text models",
    "audio_data": "it serves text models",
    "video_data": "it serves text models",
    "lora_path": "it serves the policy, whose adapter comes with its weights",
    "lora_id": "it serves the policy, whose adapter comes with its weights",
    "token_ids_logprob": "use top_logprobs_num",
    "return_hidden_states": "it returns tokens only",
    "return_indexer_topk": "this model has no indexer",
    "custom_logit_processor": "it runs no code of a request",
}
_UNSUPPORTED_PARAMS = {
    "json_schema": "it does not constrain output to a grammar",
    "regex": "it does not constrain output to a grammar",
    "ebnf": "it does not constrain output to a grammar",
    "structural_tag": "it does not constrain output to a grammar",
    "stop_regex": "use stop strings or stop_token_ids",
    "logit_bias": "it does not bias tokens",
    "beam_width": "it samples",
    "custom_params": "it runs no custom logit processors",
    "watermark": "it does not watermark",
}
_INERT_PARAMS = frozenset({"spaces_between_special_tokens", "stream_interval"})
"""Accepted; they change how text is shown or how often, not what is generated."""
_MOST_STOP_STRINGS = 32


class BadRequest(MilesError):
    """A request this engine cannot serve as it stands."""

    status = 400


class Unavailable(BadRequest):
    """A request that this engine cannot serve now."""

    status = 503


class NotSupported(BadRequest):
    """An endpoint of the protocol that this engine does not offer."""

    status = 501


@dataclass(frozen=True, slots=True)
class GenerateItem:
    """One prompt of a request."""

    rid: str | None
    text: str | None
    input_ids: list[int] | None
    params: SamplingParams
    return_logprob: bool = False
    logprob_start_len: int = -1
    top_logprobs_num: int = 0
    return_routed_experts: bool = False


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """A parsed ``/generate`` body."""

    items: list[GenerateItem]
    batched: bool
    """The answer is a list."""
    stream: bool


def parse_generate(body: Any) -> GenerateRequest:
    """Parse a body; raise BadRequest naming the field, its value and what was expected."""
    if not isinstance(body, Mapping):
        raise BadRequest("the body must be a JSON object")
    _refuse(body, _UNSUPPORTED_FIELDS, _READ_FIELDS | _IGNORED_FIELDS, "field")
    text, ids = body.get("text"), body.get("input_ids")
    if (text is None) == (ids is None):
        raise BadRequest("give either text or input_ids")
    given = text if text is not None else ids
    batched = isinstance(given, list) and (text is not None or (bool(given) and isinstance(given[0], list)))
    prompts: list[Any] = given if batched and isinstance(given, list) else [given]
    count = len(prompts)
    if count == 0:
        raise BadRequest("text is an empty list; give at least one prompt")

    def spread(name: str, default: Any) -> list[Any]:
        value = body.get(name)
        if batched and isinstance(value, list):
            if len(value) != count:
                raise BadRequest(f"{name} has {len(value)} entries for {count} prompts")
            return [default if entry is None else entry for entry in value]
        return [default if value is None else value] * count

    rids = spread("rid", None)
    if batched and isinstance(body.get("rid"), str):
        rids = [f"{body['rid']}_{number}" for number in range(count)]
    columns = zip(
        prompts,
        rids,
        spread("sampling_params", {}),
        spread("return_logprob", False),
        spread("logprob_start_len", -1),
        spread("top_logprobs_num", 0),
        spread("return_routed_experts", False),
        strict=True,
    )
    items = [
        GenerateItem(
            rid=None if rid is None else str(rid),
            text=_text(prompt) if text is not None else None,
            input_ids=None if text is not None else _token_ids(prompt),
            params=parse_sampling_params(params),
            return_logprob=bool(logprob),
            logprob_start_len=_integer("logprob_start_len", start, -1),
            top_logprobs_num=_integer("top_logprobs_num", top, 0),
            return_routed_experts=bool(experts),
        )
        for prompt, rid, params, logprob, start, top, experts in columns
    ]
    stream = bool(body.get("stream"))
    if stream and (batched or items[0].params.n > 1):
        raise BadRequest("stream is for a single prompt with n=1")
    return GenerateRequest(items, batched, stream)


def parse_sampling_params(values: Any) -> SamplingParams:
    """Parse and check ``sampling_params``; null means the default."""
    if not isinstance(values, Mapping):
        raise BadRequest(f"sampling_params must be an object, not {values!r}")
    known = frozenset(SamplingParams.__dataclass_fields__)
    _refuse(values, _UNSUPPORTED_PARAMS, known | _INERT_PARAMS, "sampling parameter")
    given = {name: value for name, value in values.items() if value is not None and name in known}
    if "stop" in given:
        given["stop"] = _stop_strings(given["stop"])
    if "stop_token_ids" in given:
        given["stop_token_ids"] = tuple(_token_ids(given["stop_token_ids"]))
    for name in ("max_new_tokens", "min_new_tokens", "n", "top_k", "sampling_seed"):
        if name in given:
            given[name] = _integer(name, given[name], None)
    for name in _RANGES:
        if name in given:
            given[name] = _number(name, given[name])
    params = SamplingParams(**given)
    _check(params)
    return params


_RANGES: dict[str, tuple[float, float, str]] = {
    "temperature": (0.0, math.inf, "at least 0"),
    "top_p": (1e-12, 1.0, "in (0, 1]"),
    "min_p": (0.0, 1.0, "in [0, 1]"),
    "frequency_penalty": (-2.0, 2.0, "in [-2, 2]"),
    "presence_penalty": (-2.0, 2.0, "in [-2, 2]"),
    "repetition_penalty": (1e-12, 2.0, "in (0, 2]"),
}


def _check(params: SamplingParams) -> None:
    for name, (low, high, text) in _RANGES.items():
        value = getattr(params, name)
        if not (low <= value <= high) or math.isinf(value):
            raise BadRequest(f"{name} is {value}; it must be {text}")
    if params.top_k != -1 and params.top_k < 1:
        raise BadRequest(f"top_k is {params.top_k}; it must be at least 1, or -1 for all tokens")
    if params.n < 1:
        raise BadRequest(f"n is {params.n}; it must be at least 1")
    if params.max_new_tokens < 0:
        raise BadRequest(f"max_new_tokens is {params.max_new_tokens}; it must be at least 0")
    if not 0 <= params.min_new_tokens <= params.max_new_tokens:
        raise BadRequest(
            f"min_new_tokens is {params.min_new_tokens}; it must be between 0 and max_new_tokens, "
            f"which is {params.max_new_tokens}"
        )
    if params.sampling_seed is not None and not -(2**63) <= params.sampling_seed < 2**63:
        raise BadRequest(f"sampling_seed is {params.sampling_seed}; it must fit 64 bits")


def _refuse(body: Mapping[str, Any], unsupported: Mapping[str, str], known: frozenset[str], kind: str) -> None:
    for name, value in body.items():
        if name in unsupported and value:
            raise BadRequest(f"the embedded engine does not support {name}: {unsupported[name]}")
        if name not in known and name not in unsupported:
            near = difflib.get_close_matches(name, known, 1)
            raise BadRequest(f"unknown {kind} {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""))


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise BadRequest(f"text must be a string, not {value!r}")
    return value


def _token_ids(value: Any) -> list[int]:
    if not isinstance(value, list) or not all(type(token) is int for token in value):
        raise BadRequest("token ids must be a list of integers")
    return value


def _stop_strings(value: Any) -> tuple[str, ...]:
    strings = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else (None,)
    if not all(isinstance(text, str) for text in strings):
        raise BadRequest(f"stop must be a string or a list of strings, not {value!r}")
    if len(strings) > _MOST_STOP_STRINGS:
        raise BadRequest(f"stop has {len(strings)} strings; at most {_MOST_STOP_STRINGS} are allowed")
    return tuple(text for text in strings if text)


def _integer(name: str, value: Any, lowest: int | None) -> int:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if type(value) is not int:
        raise BadRequest(f"{name} is {value!r}; it must be an integer")
    if lowest is not None and value < lowest:
        raise BadRequest(f"{name} is {value}; it must be at least {lowest}")
    return value


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BadRequest(f"{name} is {value!r}; it must be a number")
    return float(value)


def render(progress: Progress, item: GenerateItem, text: str | None) -> dict[str, Any]:
    """The JSON object of one response."""
    sequence = progress.sequence
    num_output = len(progress.tokens)
    spans = progress.versions
    meta: dict[str, Any] = {
        "id": sequence.rid,
        "finish_reason": progress.finish,
        "prompt_tokens": len(sequence.prompt),
        "completion_tokens": num_output,
        "cached_tokens": sequence.cached_tokens,
        "weight_version": spans[-1][0],
        "weight_versions": [{"version": name, "start": start, "end": end} for name, start, end in spans],
        "num_retractions": sequence.num_retractions,
        "e2e_latency": sequence.finished - sequence.created if progress.finish else None,
    }
    if item.return_logprob:
        meta["output_token_logprobs"] = [
            (logp, token, None) for logp, token in zip(progress.logps, progress.tokens, strict=True)
        ]
        meta["output_token_logprobs_length"] = num_output
        meta["input_token_logprobs"] = _input_logprobs(progress)
        if item.top_logprobs_num:
            meta["output_top_logprobs"] = [_triples(top) for top in sequence.top_logps]
            scored = sequence.score_from is not None
            meta["input_top_logprobs"] = [None, *map(_triples, sequence.prompt_top_logps)] if scored else []
    if item.return_routed_experts and progress.finish is not None:
        meta["routed_experts"] = _base64(sequence.experts)
    answer: dict[str, Any] = {} if text is None else {"text": text}
    return {**answer, "output_ids": progress.tokens, "meta_info": meta}


def _input_logprobs(progress: Progress) -> list[tuple[float | None, int, None]]:
    """Of the prompt tokens from ``score_from``; the first one's is not known, as in SGLang."""
    sequence = progress.sequence
    if sequence.score_from is None:
        return []
    tokens = sequence.prompt[sequence.score_from :]
    known = [None, *sequence.prompt_logps][: len(tokens)]
    return [(logp, token, None) for logp, token in zip(known, tokens, strict=False)]


def _base64(experts: npt.NDArray[np.int32] | None) -> str | None:
    """Little-endian int32 [prompt + output tokens - 1, layers, experts per token], as in SGLang."""
    return None if experts is None else base64.b64encode(experts.astype("<i4").tobytes()).decode()


def _triples(top: TopLogps) -> list[tuple[float, int, None]]:
    return [(logp, token, None) for logp, token in top]
