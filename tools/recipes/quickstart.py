"""A small model learns to think, on a laptop, in minutes: ``hatch run quickstart``.

1. Make a tokenizer, a Qwen3 of 117,000 parameters with random weights, and sums of two numbers to practise on.
2. Teach it by demonstrations (``miles train --loss-type sft_loss``).  Some add column by column inside ``<think>``
   before they answer, most answer at once.  The model learns both, mostly answers at once, and is mostly wrong.
3. Let it practise (``miles train``, GRPO): the engine samples answers, reasoning-gym's verifier scores them, the
   trainer reinforces what was right.  Thinking turns out to pay, and the model thinks first.

Nothing is downloaded.  The same command continues where it was interrupted.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from stage import CPU_TRAINER, FROM_RANDOM_WEIGHTS, Stage, imitation_of

import addition
import tiny_lm
from miles.core.report import evaluations
from miles.core.run_directory import RunDirectory

VOCABULARY = 512
TOKENIZER_ROWS = 2_000
"""Demonstrations that the tokenizer is trained on: there are few words to learn."""


def main() -> None:
    """Make, teach, practise; say what came of it."""
    options = parse_options()
    output = options.output or Path("runs") / f"quickstart-{options.seed}"
    print(f"Step 1 of 3: a tokenizer, a model and {addition.Task().num_train:,} problems, in {output}", flush=True)
    model, data = prepare(output, options.seed)
    teaching = demonstrations_stage(output, model, data, options.seed, num_rollout=options.sft_steps)
    practice = practice_stage(output, data, options.seed, num_rollout=options.steps)
    print("\nStep 2 of 3: learn from demonstrations", flush=True)
    teaching.run()
    print("\nStep 3 of 3: practise", flush=True)
    practice.run()
    print(f"\n{summary(practice.directory)}")


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="of data, weights and sampling (default: 0)")
    parser.add_argument("--output", type=Path, help="where everything is made (default: runs/quickstart-SEED)")
    parser.add_argument("--sft-steps", type=int, default=80, help="batches of 640 demonstrations (default: 80)")
    parser.add_argument("--steps", type=int, default=60, help="rollouts to practise (default: 60)")
    return parser.parse_args()


def prepare(output: Path, seed: int) -> tuple[Path, addition.Data]:
    """The checkpoint to start from, and the data.  What an earlier, interrupted start left half made is made again."""
    model, ready = output / "model", output / "ready"
    data = addition.Data.at(output / "data")
    if not ready.is_file():
        data = addition.write_data(output / "data", addition.Task(), seed)
        count = tiny_lm.save_checkpoint(
            model, tokenizer_texts(data), vocab_size=VOCABULARY, shape=tiny_lm.Shape(), seed=seed
        )
        ready.write_text(f"{count} parameters\n")
    return model, data


def tokenizer_texts(data: addition.Data) -> list[str]:
    """Questions and answers of the first demonstrations."""
    with data.demonstrations.open() as lines:
        rows = [json.loads(line) for line, _ in zip(lines, range(TOKENIZER_ROWS), strict=False)]
    return [turn["content"] for row in rows for turn in row["messages"]]


def demonstrations_stage(output: Path, model: Path, data: addition.Data, seed: int, num_rollout: int) -> Stage:
    """Supervised fine-tuning from random weights."""
    return imitation_of(
        output,
        model,
        data.demonstrations,
        seed=seed,
        num_rollout=num_rollout,
        flags=FROM_RANDOM_WEIGHTS,
    )


def practice_stage(output: Path, data: addition.Data, seed: int, num_rollout: int) -> Stage:
    """GRPO: 32 problems, 8 answers each, one optimizer step per rollout."""
    return Stage(
        output / "grpo",
        num_rollout,
        CPU_TRAINER
        | {
            "hf-checkpoint": output / "taught",
            "prompt-data": data.train,
            "input-key": "prompt",
            "label-key": "label",
            "apply-chat-template": True,
            "rollout-shuffle": True,
            "rollout-batch-size": 32,
            "n-samples-per-prompt": 8,
            "global-batch-size": 256,
            "rollout-max-response-len": 40,
            "rollout-skip-special-tokens": True,
            "rm-type": "reasoning_gym",
            "rollout-engine": "embedded",
            "advantage-estimator": "grpo",
            "eps-clip": 0.2,
            "eps-clip-high": 0.28,
            "lr": 1e-4,
            "lr-decay-style": "constant",
            "adam-beta2": 0.98,
            "eval-prompt-data": ("sums", data.evaluation),
            "eval-interval": 5,
            "eval-temperature": 0,
            "save-interval": 20,
            "seed": seed,
            "rollout-seed": seed,
        },
    )


def summary(directory: Path) -> str:
    """What came of the practice: before, after, and where to look."""
    run = RunDirectory(directory)
    found = evaluations(run)
    before, after = found[0], found[-1]
    return "\n".join(
        [
            f"Held-out sums answered right:  {before.pass_rate:.1%} before practice, {after.pass_rate:.1%} after",
            f"Tokens per answer:             {before.mean_length:.1f} before practice, {after.mean_length:.1f} after",
            f"The run:                       {run.path}",
            f"The page to open:              {run.report}",
        ]
    )


if __name__ == "__main__":
    main()
