"""Generation by transformers itself, for ``engine.py``: reads workloads as JSON lines, answers a line when done.

Ways: ``dynamic`` and ``static`` are ``generate`` on a left-padded batch with that cache, which runs to the longest
response of the batch; ``paged`` is transformers' own continuous batching.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.generation.configuration_utils import ContinuousBatchingConfig

Requests = list[tuple[list[int], int]]
"""(prompt, tokens to generate)"""
BATCH = 64
NO_TOKEN = -1


def main() -> None:
    path, way, threads, dtype = sys.argv[1:5]
    torch.set_num_threads(int(threads))
    attention = "paged|sdpa" if way == "paged" else "sdpa"
    dtype_ = getattr(torch, dtype)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype_, attn_implementation=attention).eval()
    run = paged(model) if way == "paged" else padded(model, way)
    print("ready", flush=True)
    for line in sys.stdin:
        requests: Requests = json.loads(line)
        torch.manual_seed(0)
        print(json.dumps({"tokens": run(requests)}), flush=True)


def padded(model: PreTrainedModel, cache: str) -> Callable[[Requests], int]:
    """``generate``; tokens beyond a request's length are computed and do not count."""

    def run(requests: Requests) -> int:
        for first in range(0, len(requests), BATCH):
            batch = requests[first : first + BATCH]
            longest = max(len(prompt) for prompt, _ in batch)
            ids = torch.zeros(len(batch), longest, dtype=torch.int64)
            mask = torch.zeros_like(ids)
            for row, (prompt, _) in enumerate(batch):
                ids[row, longest - len(prompt) :] = torch.tensor(prompt)
                mask[row, longest - len(prompt) :] = 1
            options = sampling(max(length for _, length in batch))
            if cache == "static":
                options.cache_implementation = "static"
            model.generate(ids, attention_mask=mask, generation_config=options)
        return sum(length for _, length in requests)

    return run


def paged(model: PreTrainedModel) -> Callable[[Requests], int]:
    """Continuous batching."""
    config = ContinuousBatchingConfig(
        page_size=32, num_blocks=1024, max_batch_tokens=512, max_requests_per_batch=BATCH, return_logprobs=True
    )
    manager = model.init_continuous_batching(generation_config=sampling(512), continuous_batching_config=config)
    manager.start()

    def run(requests: Requests) -> int:
        for prompt, length in requests:
            manager.add_request(prompt, max_new_tokens=length)
        tokens, finished = 0, 0
        while finished < len(requests):
            result = manager.get_result(timeout=60)
            if result is None:
                raise RuntimeError("continuous batching made nothing for a minute")
            if result.is_finished():
                tokens += len(result.generated_tokens)
                finished += 1
        return tokens

    return run


def sampling(max_new_tokens: int) -> GenerationConfig:
    """Temperature 1 from the whole distribution, and no early end."""
    return GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        eos_token_id=NO_TOKEN,
        pad_token_id=0,
        max_new_tokens=max_new_tokens,
    )


if __name__ == "__main__":
    main()
