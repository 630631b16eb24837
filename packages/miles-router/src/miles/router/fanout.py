"""Commands that concern every worker: sent to all of them, answered with one combined result."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import Any

from miles.router.fetch import FetchError, fetch
from miles.router.framing import Header, connection_options
from miles.router.workers import Worker

FAN_OUT_PATHS = frozenset(
    (
        "/flush_cache",
        "/abort_request",
        "/pause_generation",
        "/continue_generation",
        "/begin_weight_update",
        "/update_weights_from_tensor",
        "/update_weights_from_distributed",
        "/update_weights_from_disk",
        "/end_weight_update",
        "/update_weight_version",
        "/init_weights_update_group",
        "/destroy_weights_update_group",
        "/update_weights_from_ipc",
        "/post_process_weights",
        "/pull_weights",
        "/weights_checker",
        "/load_lora_adapter",
        "/load_lora_adapter_from_tensors",
        "/load_lora_adapter_from_distributed",
        "/unload_lora_adapter",
        "/start_profile",
        "/stop_profile",
        "/set_internal_state",
        "/release_memory_occupation",
        "/resume_memory_occupation",
    )
)

ONE_WORKER_PATHS = frozenset(("/init_weights_update_group",))
"""Each worker needs a body of its own (its rank), so these are refused when there are several."""

_WRITTEN_ANEW = frozenset((b"content-length", b"transfer-encoding", b"host", b"expect"))


async def fan_out(
    workers: Sequence[Worker],
    method: str,
    target: str,
    headers: list[Header],
    body: bytes,
    timeout_s: float | None,
) -> dict[str, Any]:
    """Send one request to all ``workers`` at once.

    ``success`` is true when every worker answered below 400 and none said ``"success": false``; ``workers`` maps each
    URL to its ``status`` (None: no answer) and ``body`` (parsed when it is JSON).
    """
    dropped = connection_options(headers) | _WRITTEN_ANEW
    kept = [field for field in headers if field[0] not in dropped]
    answers = await asyncio.gather(*(_ask(worker, method, target, kept, body, timeout_s) for worker in workers))
    failed = [f"{worker.url}: {_complaint(answer)}" for worker, answer in zip(workers, answers) if _complaint(answer)]
    return {
        "success": not failed,
        "message": "; ".join(failed),
        "workers": {worker.url: answer for worker, answer in zip(workers, answers)},
    }


async def _ask(
    worker: Worker, method: str, target: str, headers: list[Header], body: bytes, timeout_s: float | None
) -> dict[str, Any]:
    try:
        answer = await fetch(worker, method, target, headers=headers, body=body, timeout_s=timeout_s)
    except FetchError as error:
        return {"status": None, "body": str(error)}
    try:
        return {"status": answer.status, "body": json.loads(answer.body)}
    except (ValueError, RecursionError):
        return {"status": answer.status, "body": answer.body.decode("utf-8", "replace")}


def _complaint(answer: dict[str, Any]) -> str:
    """Why an answer counts as a failure; empty when it does not."""
    status, body = answer["status"], answer["body"]
    if status is None:
        return str(body)
    said_no = isinstance(body, dict) and body.get("success") is False
    if status < 400 and not said_no:
        return ""
    detail = body.get("message", body) if isinstance(body, dict) else body
    return f"answered {status}: {detail}"
