"""Packing: how full micro-batches get, how even ranks are, how long the plan takes; beside TRL's best-fit decreasing.

    python tools/bench/packing.py [--trl-python PATH]

Prints one JSON line.  TRL, when a Python that has it is named, packs the same lengths in the same run, as whole
samples: it knows no shared prompts.  ``bound`` is the least number of micro-batches that could hold the tokens, and
``fill_at_bound`` how full these would be: with few micro-batches, the last one's emptiness weighs.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import time
from collections.abc import Callable, Sequence

import numpy as np

from miles.core.training.bins import Item
from miles.core.training.packing import Packing, plan_micro_batches

CAPACITY = 16_384
GROUP = 8
TRL_PROGRAM = """
import json, sys, time
from datasets import Dataset
from trl.data_utils import pack_dataset
lengths, capacity = json.load(sys.stdin)
dataset = Dataset.from_dict({"input_ids": [[0] * n for n in lengths]})
start = time.process_time()
packed = pack_dataset(dataset, seq_length=capacity, strategy="bfd")
print(json.dumps([len(packed), time.process_time() - start]))
"""


def lengths_of(count: int, seed: int) -> list[Item]:
    """Groups of one prompt; responses of a heavy-tailed length, as reasoning models give."""
    rng = np.random.default_rng(seed)
    prompts = rng.integers(50, 500, count // GROUP)
    responses = np.clip(rng.lognormal(7.0, 0.7, count), 16, 8_000).astype(int)
    return [Item(i, i // GROUP, int(prompts[i // GROUP]), int(responses[i])) for i in range(count)]


def without_groups(items: Sequence[Item]) -> list[Item]:
    return [Item(item.sample, item.sample, item.prompt, item.response) for item in items]


def tokens_of(items: Sequence[Item], chosen: Sequence[int]) -> int:
    prompts = {items[i].family: items[i].prompt for i in chosen}
    return sum(prompts.values()) + sum(items[i].response for i in chosen)


def cpu_seconds(call: Callable[[], object]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def measured(items: Sequence[Item], num_ranks: int) -> dict[str, float]:
    packing = Packing(max_tokens=CAPACITY, balance=True)
    plan: list[list[list[int]]] = []
    seconds = cpu_seconds(lambda: plan.extend(plan_micro_batches(items, num_ranks, packing)))
    ranks = [[tokens_of(items, chosen) for chosen in bins] for bins in plan]
    micro_batches = sum(map(len, ranks))
    totals = [sum(tokens) for tokens in ranks]
    distinct = sum({item.family: item.prompt for item in items}.values()) + sum(item.response for item in items)
    bound = num_ranks * -(-distinct // (CAPACITY * num_ranks))
    waiting = sum(max(round_) for round_ in zip(*ranks, strict=True)) * num_ranks
    return {
        "micro_batches": micro_batches,
        "bound": bound,
        "fill_at_bound": round(distinct / (bound * CAPACITY), 5),
        "fill": round(sum(totals) / (micro_batches * CAPACITY), 5),
        "tokens_computed_twice": round(sum(totals) / distinct - 1, 5),
        "imbalance_of_ranks": round(max(totals) * num_ranks / sum(totals) - 1, 6),
        "waiting_for_the_slowest": round(waiting / sum(totals) - 1, 6),
        "cpu_seconds": round(seconds, 3),
    }


def trl(python: str, items: Sequence[Item]) -> dict[str, float]:
    lengths = [item.prompt + item.response for item in items]
    answer = subprocess.run(
        [python, "-c", TRL_PROGRAM], input=json.dumps([lengths, CAPACITY]), capture_output=True, text=True, check=True
    )
    packs, seconds = json.loads(answer.stdout.splitlines()[-1])
    return {
        "micro_batches": packs,
        "tokens": sum(lengths),
        "fill": round(sum(lengths) / (packs * CAPACITY), 5),
        "cpu_seconds": round(seconds, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trl-python", help="a Python with TRL")
    python = parser.parse_args().trl_python
    result: dict[str, object] = {"bench": "packing", "capacity": CAPACITY, "samples_per_prompt": GROUP}
    for count in (1_024, 100_000):
        items = lengths_of(count, seed=0)
        case: dict[str, object] = {f"miles, {ranks} ranks": measured(items, ranks) for ranks in (1, 8)}
        case["miles, prompts not shared"] = measured(without_groups(items), 1)
        if python:
            case["trl bfd"] = trl(python, items)
        result[f"{count} samples"] = case
    print(json.dumps(result))


if __name__ == "__main__":
    main()
