"""GRPO without a framework, read top to bottom: the floor of ``main_job_vs_floor.py``.

Appends one JSON line per step to ``--marks``.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache


def main() -> None:
    options = parse_options()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    tokenizer = AutoTokenizer.from_pretrained(options.checkpoint)
    model = AutoModelForCausalLM.from_pretrained(options.checkpoint, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    rows = [json.loads(line) for line in options.data.read_text().splitlines()]
    random.Random(options.seed).shuffle(rows)
    for row in rows:
        row["ids"] = prompt_ids(tokenizer, row["prompt"])
    for step in range(options.steps):
        chosen = [rows[(step * options.prompts + i) % len(rows)] for i in range(options.prompts)]
        batch = [row for row in chosen for _ in range(options.samples)]
        responses = generate(model, [row["ids"] for row in batch], options.max_new, tokenizer.eos_token_id)
        rewards = torch.tensor([score(tokenizer, ids, row["label"]) for ids, row in zip(responses, batch, strict=True)])
        train(model, optimizer, [row["ids"] for row in batch], responses, advantages(rewards, options.samples))
        mark = {"step": step, "mean_length": sum(map(len, responses)) / len(batch), "reward": rewards.mean().item()}
        with options.marks.open("a") as stream:
            stream.write(json.dumps(mark) + "\n")


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--marks", type=Path, required=True)
    parser.add_argument("--output", help="not used: nothing else is written")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--max-new", type=int, default=40)
    parser.add_argument("--lr", type=float, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def prompt_ids(tokenizer: Any, messages: list[dict[str, str]]) -> list[int]:
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


@torch.no_grad()
def generate(model: Any, prompts: list[list[int]], max_new: int, end_id: int) -> list[list[int]]:
    """Sample a response to every prompt at temperature 1, all in one left-padded batch."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    places = (mask.cumsum(1) - 1).clamp(min=0)
    cache, sampled, finished = DynamicCache(), [], torch.zeros(len(prompts), dtype=torch.bool)
    for _ in range(max_new):
        inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": places, "past_key_values": cache}
        output = model(**inputs, use_cache=True, logits_to_keep=1)
        token = torch.multinomial(torch.softmax(output.logits[:, -1], -1), 1)[:, 0]
        sampled.append(token)
        finished |= token == end_id
        if finished.all():
            break
        ids, places = token[:, None], places[:, -1:] + 1
        mask = torch.cat([mask, torch.ones(len(prompts), 1, dtype=mask.dtype)], 1)
    rows = torch.stack(sampled, 1).tolist()
    return [row[: row.index(end_id) + 1] if end_id in row else row for row in rows]


def score(tokenizer: Any, ids: list[int], label: str) -> float:
    """reasoning-gym's score of a sum."""
    answer = tokenizer.decode(ids, skip_special_tokens=True).rpartition("</think>")[2].strip()
    if answer == label:
        return 1.0
    return len(label) / len(answer) if label in answer else 0.0


def advantages(rewards: torch.Tensor, group_size: int) -> torch.Tensor:
    """Rewards, centred and scaled within each group."""
    groups = rewards.view(-1, group_size)
    centred = groups - groups.mean(1, keepdim=True)
    return (centred / (groups.std(1, keepdim=True) + 1e-6)).flatten()


def train(
    model: Any,
    optimizer: torch.optim.Optimizer,
    prompts: list[list[int]],
    responses: list[list[int]],
    gains: torch.Tensor,
) -> None:
    """One step of the clipped surrogate; on-policy, the ratio is 1 and only its gradient matters."""
    lengths = torch.tensor([len(prompt) + len(response) for prompt, response in zip(prompts, responses, strict=True)])
    width = int(lengths.max())
    both = [prompt + response for prompt, response in zip(prompts, responses, strict=True)]
    ids = torch.tensor([row + [0] * (width - len(row)) for row in both])
    columns = torch.arange(width)
    mask = (columns < lengths[:, None]).long()
    trained = (mask.bool() & (columns >= torch.tensor([len(prompt) for prompt in prompts])[:, None]))[:, 1:]
    hidden = model.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state[:, :-1]
    logp = -functional.cross_entropy(model.lm_head(hidden[trained]), ids[:, 1:][trained], reduction="none")
    ratio = (logp - logp.detach()).exp()
    gain = gains[:, None].expand(trained.shape)[trained]
    surrogate = torch.min(ratio * gain, ratio.clamp(0.8, 1.28) * gain)
    share = (trained / trained.sum(1, keepdim=True).clamp(min=1))[trained] / len(prompts)
    loss = -(surrogate * share).sum()
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


if __name__ == "__main__":
    main()
