"""A small rollout buffer service: it reads prompts, asks the run's engines for responses, grades them, hands them out.

    python tools/rollout_buffer/service.py --port 8889
    miles train --rollout-buffer-url http://127.0.0.1:8889 --disable-rollout-global-dataset \\
        --prompt-data prompts.jsonl --rollout-task-type length ...

``TASKS`` maps a task type to a function from a row of the prompt file and a response's text to a reward; put yours
there.
Records carry the token ids and log-probabilities of the engine, so nothing is tokenized again.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aiohttp import ClientSession, ClientTimeout, web
from transformers import AutoTokenizer

Row = dict[str, Any]

IN_FLIGHT = 32
"""Prompts in generation at the same time."""
AHEAD = 64
"""Records that may wait to be fetched: more would only grow old."""

TASKS: dict[str, Callable[[Row, str], float]] = {
    "length": lambda row, response: min(len(response), 100) / 100,
    "exact": lambda row, response: float(response.strip() == str(row.get("label"))),
}


@dataclass
class Service:
    """Makes records from ``/start_rollout`` on, until it is ended."""

    records: asyncio.Queue[Row] = field(default_factory=lambda: asyncio.Queue(AHEAD))
    work: asyncio.Task[None] | None = None

    async def start(self, request: web.Request) -> web.Response:
        """A run that starts again replaces what was made for the last one."""
        settings = await request.json()
        if settings["task_type"] not in TASKS:
            return web.json_response({"message": f"no such task; there are {sorted(TASKS)}"}, status=400)
        if self.work is not None:
            self.work.cancel()
        self.records = asyncio.Queue(AHEAD)
        self.work = asyncio.create_task(self.generate(settings))
        return web.json_response({"message": "started"})

    async def get(self, request: web.Request) -> web.Response:
        """Everything that is finished."""
        if self.work is not None and self.work.done() and (error := self.work.exception()) is not None:
            cause = error.exceptions[0] if isinstance(error, BaseExceptionGroup) else error
            return web.json_response({"message": f"{type(cause).__name__}: {cause}"}, status=500)
        found = [self.records.get_nowait() for _ in range(self.records.qsize())]
        return web.json_response({"success": bool(found), "data": {"data": found, "meta_info": {}}})

    async def generate(self, settings: Row) -> None:
        """All prompts but those to skip, ``num_epoch`` times, each ``num_repeat_per_sample`` times."""
        rows = await asyncio.to_thread(read_rows, Path(settings["input_file"]))
        tokenizer = AutoTokenizer.from_pretrained(settings["tokenizer_path"])
        skip, slots = set(settings["skip_instance_ids"]), asyncio.Semaphore(IN_FLIGHT)
        prompts = [(f"{epoch}-{n}", row) for epoch in range(int(settings["num_epoch"])) for n, row in enumerate(rows)]
        client = ClientSession(settings["remote_engine_url"], timeout=ClientTimeout(total=600))
        async with client as session, asyncio.TaskGroup() as group:
            for instance, row in prompts:
                for _ in range(int(settings["num_repeat_per_sample"]) if instance not in skip else 0):
                    await slots.acquire()
                    made = self.respond(session, tokenizer, settings, instance, row)
                    group.create_task(made).add_done_callback(lambda _: slots.release())

    async def respond(self, session: ClientSession, tokenizer: Any, settings: Row, instance: str, row: Row) -> None:
        """One record."""
        asked = row.get("messages") or row["prompt"]
        messages = [{"role": "user", "content": asked}] if isinstance(asked, str) else asked
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        prompt = tokenizer.encode(text, add_special_tokens=False)
        sampling = dict(settings["sampling_params"])
        sampling["max_new_tokens"] = sampling.pop("max_tokens")
        payload = {"input_ids": prompt, "sampling_params": sampling, "return_logprob": True}
        async with session.post("/generate", json=payload) as response:
            response.raise_for_status()
            answer = await response.json()
        meta = answer["meta_info"]
        sampled = meta["output_token_logprobs"]
        await self.records.put(
            {
                "uid": meta.get("id", instance),
                "instance_id": instance,
                "messages": [*messages, {"role": "assistant", "content": answer["text"]}],
                "tokens": [*prompt, *(token for _, token, *_ in sampled)],
                "response_length": len(sampled),
                "rollout_log_probs": [logp for logp, *_ in sampled],
                "weight_version": meta.get("weight_version"),
                "reward": TASKS[settings["task_type"]](row, answer["text"]),
                "extra_info": {"finish_reason": meta["finish_reason"]["type"]},
            }
        )


def read_rows(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8889)
    options = parser.parse_args()
    service = Service()
    app = web.Application()
    app.router.add_post("/start_rollout", service.start)
    app.router.add_post("/get_rollout_data", service.get)
    web.run_app(app, host=options.host, port=options.port)


if __name__ == "__main__":
    main()
