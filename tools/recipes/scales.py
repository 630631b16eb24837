"""A small model learns to use a tool: ``python tools/recipes/scales.py``.

1. Make a tokenizer and a Qwen3 of about 100,000 parameters with random weights.
2. Teach it by demonstrations: asked what a box weighs, some use the scales and read the answer off, most guess.
   The model learns both, mostly guesses, and is mostly wrong.
3. Let it practise with the scales at hand (the generator ``multi_turn``, GRPO).  Using them turns out to pay.

Nothing is downloaded.  The same command continues where it was interrupted.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scales_tool import weight
from stage import CPU_TRAINER, FROM_RANDOM_WEIGHTS, Stage, Value, imitation_of

import tiny_lm
from miles.core.report import evaluations
from miles.core.run_directory import RunDirectory

BOXES = tuple(range(10, 100))
TOOL_SHARE = 0.4
"""Demonstrations that use the scales."""
NUM_DEMONSTRATIONS = 8_000
VOCABULARY = 320


@dataclass(frozen=True, slots=True)
class Data:
    """The files of the task."""

    demonstrations: Path
    """Rows of ``messages``."""
    prompts: Path
    """Rows of ``prompt`` and ``label``: every box."""


def main() -> None:
    """Make, teach, practise; say what came of it."""
    options = parse_options()
    output = options.output or Path("runs") / f"scales-{options.seed}"
    model, data = prepare(output, options.seed)
    print("\nStep 1 of 2: learn from demonstrations", flush=True)
    teaching_stage(output, model, data, options.seed, num_rollout=options.sft_steps).run()
    print("\nStep 2 of 2: practise with the scales", flush=True)
    practice = practice_stage(output, data, options.seed, num_rollout=options.steps)
    practice.run()
    print(f"\n{summary(practice.directory)}")


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="of data, weights and sampling (default: 0)")
    parser.add_argument("--output", type=Path, help="where everything is made (default: runs/scales-SEED)")
    parser.add_argument("--sft-steps", type=int, default=24, help="batches of 640 demonstrations (default: 24)")
    parser.add_argument("--steps", type=int, default=30, help="rollouts to practise (default: 30)")
    return parser.parse_args()


def prepare(output: Path, seed: int) -> tuple[Path, Data]:
    """The checkpoint to start from, and the data.  What an earlier, interrupted start left half made is made again."""
    model, ready = output / "model", output / "ready"
    data = Data(output / "demonstrations.jsonl", output / "prompts.jsonl")
    if not ready.is_file():
        output.mkdir(parents=True, exist_ok=True)
        shown = list(demonstrations(random.Random(seed)))
        _write_rows(data.demonstrations, shown)
        _write_rows(data.prompts, map(prompt_row, BOXES))
        texts = (turn["content"] for row in shown[:2_000] for turn in row["messages"])
        tiny_lm.save_checkpoint(model, texts, vocab_size=VOCABULARY, shape=tiny_lm.Shape(), seed=seed)
        ready.write_text("")
    return model, data


def demonstrations(coin: random.Random) -> Iterator[dict[str, Any]]:
    """Conversations to imitate.  What the scales show in them is made up: there is nothing to remember."""
    for _ in range(NUM_DEMONSTRATIONS):
        box, pounds = coin.choice(BOXES), str(coin.randrange(10, 100))
        turns = [("user", question(box)), ("assistant", pounds)]
        if coin.random() < TOOL_SHARE:
            turns[1:1] = [("assistant", call(box)), ("tool", pounds)]
        yield {"messages": [{"role": role, "content": text} for role, text in turns]}


def prompt_row(box: int) -> dict[str, Any]:
    """A question, with the true answer."""
    return {"prompt": [{"role": "user", "content": question(box)}], "label": str(weight(box))}


def question(box: int) -> str:
    return f"What does box {box} weigh?"


def call(box: int) -> str:
    """The tool call that finds it out."""
    return f'<tool_call>{{"name": "weigh", "arguments": {{"box": {box}}}}}</tool_call>'


def teaching_stage(output: Path, model: Path, data: Data, seed: int, num_rollout: int) -> Stage:
    """Supervised fine-tuning from random weights."""
    return imitation_of(
        output,
        model,
        data.demonstrations,
        seed=seed,
        num_rollout=num_rollout,
        flags=FROM_RANDOM_WEIGHTS,
    )


def practice_stage(output: Path, data: Data, seed: int, num_rollout: int) -> Stage:
    """GRPO: 16 questions, 8 conversations each, one optimizer step per rollout."""
    return Stage(output / "grpo", num_rollout, CPU_TRAINER | practice_flags(output / "taught", data, seed))


def practice_flags(taught: Path, data: Data, seed: int) -> dict[str, Value]:
    """A run that practises with the scales."""
    return {
        "hf-checkpoint": taught,
        "prompt-data": data.prompts,
        "input-key": "prompt",
        "label-key": "label",
        "rollout-shuffle": True,
        "rollout-batch-size": 16,
        "n-samples-per-prompt": 8,
        "global-batch-size": 128,
        "rollout-max-response-len": 64,
        "rollout-skip-special-tokens": True,
        "custom-generate-function-path": "multi_turn",
        "generate-max-turns": 2,
        "generate-tool-call-parser": "hermes",
        "generate-tool-specs-path": "scales_tool.SPECS",
        "generate-execute-tool-function-path": "scales_tool.execute",
        "custom-rm-path": "scales_tool.reward",
        "rollout-engine": "embedded",
        "advantage-estimator": "grpo",
        "eps-clip": 0.2,
        "eps-clip-high": 0.28,
        "lr": 1e-3,
        "lr-decay-style": "constant",
        "adam-beta2": 0.98,
        "eval-prompt-data": ("boxes", data.prompts),
        "eval-interval": 10,
        "save-interval": 20,
        "seed": seed,
        "rollout-seed": seed,
    }


def summary(directory: Path) -> str:
    """What came of the practice: before, after, and where to look."""
    run = RunDirectory(directory)
    found = evaluations(run)
    return "\n".join(
        [
            f"Weights told right:  {found[0].pass_rate:.1%} before practice, {found[-1].pass_rate:.1%} after",
            f"The page to open:    {run.report}",
        ]
    )


def _write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    with path.open("w") as lines:
        for row in rows:
            lines.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
