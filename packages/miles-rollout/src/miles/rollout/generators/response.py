"""What an engine answers to ``/generate``, added to a sample.  Its token ids are kept; nothing is re-tokenized."""

from __future__ import annotations

from typing import Any

from miles.core.errors import EngineError
from miles.core.types.sample import Sample
from miles.rollout.generators.experts import ExpertShape


def append_response(sample: Sample, answer: dict[str, Any], experts: ExpertShape | None = None) -> None:
    """Append the engine's tokens, log-probabilities and text, and set the status.

    ``experts``: routed experts were asked for; what the engine returns covers all tokens and replaces what was known.
    """
    meta = answer["meta_info"]
    scored = meta.get("output_token_logprobs")
    if scored is None:
        raise EngineError("the engine answered /generate without output_token_logprobs though return_logprob was set")
    token_ids = [entry[1] for entry in scored]
    _append_versions(sample, _version_spans(meta, len(token_ids)))
    # Lists that exist already belong to an earlier part of this response; a new list never changes a sample's copies.
    sample.tokens = sample.tokens + token_ids
    sample.rollout_log_probs = (sample.rollout_log_probs or []) + [entry[0] for entry in scored]
    if sample.loss_mask is not None:
        sample.loss_mask = sample.loss_mask + [1] * len(token_ids)
    sample.response_length += len(token_ids)
    sample.response += answer.get("text") or ""
    if experts is not None and (token_ids or meta.get("routed_experts") is not None):
        sample.rollout_routed_experts = experts.decode(meta.get("routed_experts"), len(sample.tokens))
    _count(sample, meta)
    sample.finish((meta.get("finish_reason") or {}).get("type"))


def append_observation(sample: Sample, token_ids: list[int], text: str) -> None:
    """Append tokens that were not sampled (a tool's answer, an environment's): they do not train."""
    count = len(token_ids)
    sample.tokens = sample.tokens + token_ids
    sample.loss_mask = (sample.loss_mask or [1] * sample.response_length) + [0] * count
    sample.rollout_log_probs = (sample.rollout_log_probs or []) + [0.0] * count
    if sample.token_weight_versions:
        sample.token_weight_versions = sample.token_weight_versions + [sample.token_weight_versions[-1]] * count
    sample.response_length += count
    sample.response += text


def _version_spans(meta: dict[str, Any], num_tokens: int) -> list[tuple[str, int]]:
    """(weight version, tokens made with it) in order.

    An engine that does not say where its weights changed under the request gets all tokens counted to the last version.
    """
    if spans := meta.get("weight_versions"):
        return [(str(span["version"]), span["end"] - span["start"]) for span in spans]
    version = meta.get("weight_version")
    return [] if version is None else [(str(version), num_tokens)]


def _append_versions(sample: Sample, spans: list[tuple[str, int]]) -> None:
    """Remember which weights made these tokens, as far as the engine counts its versions."""
    if not spans:
        return
    sample.weight_versions = sample.weight_versions + [version for version, _ in spans]
    earlier = sample.token_weight_versions or []
    if len(earlier) == sample.response_length and all(version.isdigit() for version, _ in spans):
        for version, num_tokens in spans:
            earlier = earlier + [int(version)] * num_tokens
        sample.token_weight_versions = earlier
    else:
        sample.token_weight_versions = None


def _count(sample: Sample, meta: dict[str, Any]) -> None:
    cache = sample.prefix_cache_info
    cache.cached_tokens += meta.get("cached_tokens") or 0
    cache.prompt_tokens += meta.get("prompt_tokens") or 0
    if meta.get("spec_verify_ct"):
        spec = sample.spec_info
        spec.accepted_tokens += meta.get("spec_accept_token_num") or 0
        spec.draft_tokens += meta.get("spec_draft_token_num") or 0
        spec.verify_steps += meta["spec_verify_ct"]
        spec.completion_tokens += meta.get("completion_tokens") or 0
