"""GSM8K: word problems in real text, from rows to GRPO, on a model small enough for a laptop.

1. Turn GSM8K's rows into conversations whose answers end in ``\\boxed{}``, and make a tokenizer and a model for them.
2. Imitate the training set's solutions (``miles train --loss-type sft_loss``).
3. GRPO with the mathematics grader (``miles train --rm-type math``), evaluated on test problems.

A model of a million parameters does not become good at mathematics; the path is the one that a large model takes.
Without ``--data`` the recipe runs on the excerpt of 64 + 32 problems beside it.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stage import CPU_TRAINER, Stage, imitation_of

import tiny_lm

EXCERPT = Path(__file__).with_name("gsm8k_excerpt")
VOCABULARY = 4096
SHAPE = tiny_lm.Shape(hidden=128, layers=4, heads=4, kv_heads=2, mlp=384, context=1024)
ANNOTATION = re.compile(r"<<[^>]*>>")
"""GSM8K's calculator annotations: ``48/2 = <<48/2=24>>24``."""


@dataclass(frozen=True, slots=True)
class Data:
    """The files of the recipe."""

    solutions: Path
    """Rows of ``messages``: problem and solution."""
    train: Path
    """Rows of ``prompt`` and ``label``."""
    evaluation: Path
    """Rows of the test set, of the same form."""

    @classmethod
    def at(cls, directory: Path) -> Data:
        return cls(directory / "solutions.jsonl", directory / "train.jsonl", directory / "test.jsonl")


def main() -> None:
    """Prepare, imitate, practise."""
    options = parse_options()
    model, data = prepare(options.output, options.data, options.num_eval, options.seed)
    imitation_stage(options.output, model, data, options.seed, num_rollout=options.sft_steps).run()
    practice = practice_stage(options.output, data, options.seed, num_rollout=options.steps)
    practice.run()
    print(f"\nThe run: {practice.directory}\nThe page to open: {practice.directory / 'report.html'}")


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", type=Path, default=EXCERPT, help="directory of GSM8K's train.jsonl and test.jsonl")
    parser.add_argument("--output", type=Path, default=Path("runs/gsm8k"), help="where everything is made")
    parser.add_argument("--seed", type=int, default=0, help="of weights and sampling (default: 0)")
    parser.add_argument("--num-eval", type=int, default=64, help="test problems to evaluate on (default: 64)")
    parser.add_argument("--sft-steps", type=int, default=200, help="batches of 64 solutions (default: 200)")
    parser.add_argument("--steps", type=int, default=20, help="rollouts of GRPO (default: 20)")
    return parser.parse_args()


def prepare(output: Path, source: Path, num_eval: int, seed: int) -> tuple[Path, Data]:
    """The checkpoint to start from, and the data; what is ready stays."""
    model, ready, data = output / "model", output / "ready", Data.at(output / "data")
    if not ready.is_file():
        write_data(output / "data", source, num_eval)
        texts = [turn["content"] for row in read_rows(data.solutions) for turn in row["messages"]]
        count = tiny_lm.save_checkpoint(model, texts, vocab_size=VOCABULARY, shape=SHAPE, seed=seed)
        ready.write_text(f"{count} parameters\n")
    return model, data


def write_data(directory: Path, source: Path, num_eval: int) -> Data:
    """Turn ``train.jsonl`` and ``test.jsonl`` of GSM8K in ``source`` into the rows that Miles reads."""
    data = Data.at(directory)
    directory.mkdir(parents=True, exist_ok=True)
    train, test = list(read_rows(source / "train.jsonl")), list(read_rows(source / "test.jsonl"))
    write_rows(data.solutions, map(solution_row, train))
    write_rows(data.train, map(prompt_row, train))
    write_rows(data.evaluation, map(prompt_row, test[:num_eval]))
    return data


def solution_row(row: dict[str, str]) -> dict[str, Any]:
    """A conversation to imitate: the solution without annotations, the answer in a box."""
    working, answer = split_answer(row["answer"])
    solution = f"{working}\nThe answer is \\boxed{{{answer}}}."
    return {"messages": [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": solution}]}


def prompt_row(row: dict[str, str]) -> dict[str, Any]:
    """A problem to solve, and the answer that the grader expects."""
    _, answer = split_answer(row["answer"])
    return {"prompt": [{"role": "user", "content": row["question"]}], "label": answer}


def split_answer(text: str) -> tuple[str, str]:
    """Working and final answer of ``working #### answer``; thousands separators are dropped from the answer."""
    working, mark, answer = ANNOTATION.sub("", text).rpartition("####")
    if not mark:
        raise ValueError(f"no '####' before the final answer in {text[-80:]!r}")
    return working.strip(), answer.strip().replace(",", "")


def imitation_stage(output: Path, model: Path, data: Data, seed: int, num_rollout: int) -> Stage:
    """Supervised fine-tuning on the solutions of the training set."""
    return imitation_of(
        output,
        model,
        data.solutions,
        seed=seed,
        num_rollout=num_rollout,
        flags={"rollout-batch-size": 64, "global-batch-size": 32, "lr": 2e-3, "save-interval": 50},
    )


def practice_stage(output: Path, data: Data, seed: int, num_rollout: int) -> Stage:
    """GRPO: 8 problems, 8 solutions each, graded by the value in the last box."""
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
            "rollout-batch-size": 8,
            "n-samples-per-prompt": 8,
            "global-batch-size": 64,
            "rollout-max-response-len": 256,
            "rm-type": "math",
            "rollout-engine": "embedded",
            "advantage-estimator": "grpo",
            "eps-clip": 0.2,
            "eps-clip-high": 0.28,
            "use-kl-loss": True,
            "kl-loss-coef": 0.01,
            "kl-loss-type": "low_var_kl",
            "lr": 1e-4,
            "lr-decay-style": "constant",
            "eval-prompt-data": ("gsm8k", data.evaluation),
            "eval-interval": 10,
            "eval-temperature": 0,
            "save-interval": 10,
            "seed": seed,
            "rollout-seed": seed,
        },
    )


def read_rows(path: Path) -> Iterable[dict[str, Any]]:
    with path.open() as lines:
        yield from map(json.loads, lines)


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    with path.open("w") as lines:
        lines.writelines(json.dumps(row) + "\n" for row in rows)


if __name__ == "__main__":
    main()
