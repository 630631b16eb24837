"""``/metrics`` in Prometheus' text format, under SGLang's names."""

from __future__ import annotations

from typing import Any

_METRICS = (
    ("sglang:num_running_reqs", "gauge", "num_running", "Requests that hold a slot."),
    ("sglang:num_queue_reqs", "gauge", "num_waiting", "Requests that wait for a slot."),
    ("sglang:num_used_tokens", "gauge", "kv_allocated_tokens", "Tokens for which memory is allocated."),
    ("sglang:max_total_num_tokens", "gauge", "kv_budget_tokens", "Tokens for which memory may be allocated."),
    ("sglang:prompt_tokens_total", "counter", "prompt_tokens", "Prompt tokens."),
    ("sglang:cached_tokens_total", "counter", "cached_tokens", "Prompt tokens that were copied, not computed."),
    ("sglang:generation_tokens_total", "counter", "generated_tokens", "Tokens generated."),
    ("sglang:num_requests_total", "counter", "finished", "Responses ended."),
    ("sglang:num_aborted_requests_total", "counter", "aborted", "Responses ended by an abort."),
    ("sglang:num_retractions_total", "counter", "retracted", "Responses put back to the queue."),
    ("sglang:num_steps_total", "counter", "steps", "Forward passes."),
)


def render_metrics(facts: dict[str, Any], model: str) -> str:
    """Every metric with its help and type."""
    label = model.replace("\\", "\\\\").replace('"', '\\"')
    lines = []
    for name, kind, key, text in _METRICS:
        lines += [f"# HELP {name} {text}", f"# TYPE {name} {kind}", f'{name}{{model_name="{label}"}} {facts[key]}']
    return "\n".join(lines) + "\n"
