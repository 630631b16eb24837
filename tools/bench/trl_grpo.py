"""GRPO by TRL's GRPOTrainer on a checkpoint and rows of the quick start; the other side of ``grpo_vs_trl.py``.

Runs in TRL's own environment, without Miles.  Appends one JSON line per step to ``--marks``.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

import torch
import transformers
import trl
from datasets import Dataset
from spread_lengths import length_of
from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessor, LogitsProcessorList


class ExactLengths(LogitsProcessor):
    """Forbids the end of text until a row has its length, then forces it."""

    def __init__(self, first_index: int, end_id: int) -> None:
        self.first_index, self.end_id = first_index, end_id
        self.prompt_length: int | None = None
        self.lengths: torch.Tensor | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if self.lengths is None:
            self.prompt_length = input_ids.shape[1]
            self.lengths = torch.tensor([length_of(self.first_index + row) for row in range(len(input_ids))])
        done = input_ids.shape[1] - self.prompt_length + 1 >= self.lengths
        scores[~done, self.end_id] = -torch.inf
        kept = scores[done, self.end_id].clone()
        scores[done] = -torch.inf
        scores[done, self.end_id] = kept.clamp(min=-1e4)
        return scores


def main() -> None:
    options = parse_options()
    torch.set_num_threads(options.threads)
    tokenizer = AutoTokenizer.from_pretrained(options.checkpoint, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(options.checkpoint, dtype=torch.float32)
    if options.spread:
        spread(model, tokenizer.eos_token_id, options.prompts * options.samples)
    trainer = trl.GRPOTrainer(
        model=model,
        reward_funcs=reward_function(tokenizer),
        args=grpo_config(options),
        train_dataset=Dataset.from_list(rows(options.data, tokenizer)),
        processing_class=tokenizer,
        callbacks=[Marks(options.marks)],
    )
    trainer.train()


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--marks", type=Path, required=True)
    parser.add_argument("--output", required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--max-new", type=int, default=40)
    parser.add_argument("--lr", type=float, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--spread", action="store_true")
    return parser.parse_args()


def grpo_config(options: argparse.Namespace) -> trl.GRPOConfig:
    """The knobs of the quick start's practice stage."""
    return trl.GRPOConfig(
        output_dir=options.output,
        max_steps=options.steps,
        per_device_train_batch_size=options.prompts * options.samples,
        gradient_accumulation_steps=1,
        num_generations=options.samples,
        steps_per_generation=1,
        num_iterations=1,
        max_completion_length=512 if options.spread else options.max_new,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        beta=0.0,
        epsilon=0.2,
        epsilon_high=0.28,
        loss_type="grpo",
        scale_rewards="group",
        learning_rate=options.lr,
        lr_scheduler_type="constant",
        adam_beta1=0.9,
        adam_beta2=0.98,
        weight_decay=0.0,
        max_grad_norm=1.0,
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=options.seed,
    )


def rows(path: Path, tokenizer: Any) -> list[dict[str, str]]:
    """Prompts as text, with their labels."""
    found = [json.loads(line) for line in path.read_text().splitlines()]
    template = {"tokenize": False, "add_generation_prompt": True}
    return [
        {"prompt": tokenizer.apply_chat_template(row["prompt"], **template), "label": row["label"]} for row in found
    ]


def reward_function(tokenizer: Any) -> Any:
    """The score that reasoning-gym gives a sum: 1 if the answer is the label, less if it only contains it."""

    def reward(completion_ids: list[list[int]], label: list[str], **columns: Any) -> list[float]:
        texts = tokenizer.batch_decode(completion_ids, skip_special_tokens=True)
        answers = [text.rpartition("</think>")[2].strip() for text in texts]
        return [score(answer, expected) for answer, expected in zip(answers, label, strict=True)]

    return reward


def score(answer: str, expected: str) -> float:
    if answer == expected:
        return 1.0
    return len(expected) / len(answer) if expected in answer else 0.0


def spread(model: Any, end_id: int, samples_per_step: int) -> None:
    """Make ``model.generate`` produce the lengths of ``spread_lengths``."""
    generate, step = model.generate, iter(range(1_000_000))

    def with_lengths(*args: Any, **kwargs: Any) -> Any:
        processor = ExactLengths(next(step) * samples_per_step, end_id)
        return generate(*args, **kwargs, logits_processor=LogitsProcessorList([processor]))

    model.generate = with_lengths


class Marks(transformers.TrainerCallback):
    """One line per step: its completion tokens and reward."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        if "completions/mean_length" in logs:
            line = {"step": state.global_step, "mean_length": logs["completions/mean_length"], "reward": logs["reward"]}
            with self.path.open("a") as stream:
                stream.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
