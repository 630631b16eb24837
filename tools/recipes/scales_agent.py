"""The agent of ``scales.py``'s task: a chat client that knows nothing of training.

--custom-generate-function-path agentic --custom-agent-function-path scales_agent.run
"""

from __future__ import annotations

import json
from typing import Any

import aiohttp
import scales_tool

_MOST_TURNS = 3


async def run(
    *, base_url: str, prompt: list[dict[str, Any]], request_kwargs: dict[str, Any], metadata: dict[str, Any]
) -> dict[str, Any]:
    """``--custom-agent-function-path``: ask, use the scales when the model calls them, tell how often."""
    messages, weighings = list(prompt), 0
    async with aiohttp.ClientSession() as web:
        for _ in range(_MOST_TURNS):
            body = {"messages": messages, "tools": scales_tool.SPECS, **request_kwargs}
            async with web.post(f"{base_url}/v1/chat/completions", json=body) as response:
                response.raise_for_status()
                message = (await response.json())["choices"][0]["message"]
            messages.append(message)
            calls = message.get("tool_calls") or []
            if not calls:
                break
            messages += [await _answer(call) for call in calls]
            weighings += len(calls)
    return {"agent_metrics": {"weighings": weighings}}


async def _answer(call: dict[str, Any]) -> dict[str, Any]:
    function = call["function"]
    try:
        content = await scales_tool.execute(function["name"], json.loads(function["arguments"]))
    except (KeyError, ValueError) as error:
        content = f"Error: {error!r}"
    return {"role": "tool", "tool_call_id": call["id"], "content": content}
