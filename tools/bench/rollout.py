"""What the rollout path costs on top of the engine: the same requests through everything, and straight to the engine.

    python tools/bench/rollout.py [--checkpoint DIR] [--rounds 7]

``path``: data source, chat template, client, router, engine, rewards, filter, conversion, metrics, the file of samples.
``engine``: one request with all prompts of the same rollout, posted to the engine itself; its answer is thrown away.
Both sample the same tokens with the same seeds, in turns; medians of the rounds.  One JSON line.

Goal: the path adds less than 5 % to the engine's time.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from urllib.parse import urlsplit

from process_tree import of_process, tree

from miles.core.config import Config
from miles.rollout.data_source import RolloutDataSourceWithBuffer
from miles.rollout.manager import RolloutManager
from miles.rollout.sampling import SamplingSettings
from miles.rollout.seeds import sampling_seed
from miles.rollout.text import load_tokenizer

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))
import tiny_lm

GOAL = 1.05
SHAPES = {"tiny": tiny_lm.Shape(), "10m": tiny_lm.Shape(hidden=256, layers=10, heads=8, kv_heads=4, mlp=768)}
DEADLINE_S = 600.0


@dataclass(frozen=True, slots=True)
class Cost:
    """Of one rollout.  ``cpu_s``: of every process that took part."""

    wall_s: float
    cpu_s: float
    tokens: int


def main() -> None:
    options = parse_options()
    with tempfile.TemporaryDirectory() as scratch:
        config = configure(options, Path(scratch))
        role = RolloutManager(config, Path(scratch) / "run")
        try:
            role.launch()
            role.wait_ready()
            path, engine = measure(role, config, options.rounds)
        finally:
            role.stop()
    print(json.dumps(summary(path, engine, options)))


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, help="model to generate with (default: random weights of --shape)")
    parser.add_argument("--shape", choices=SHAPES, default="tiny", help="117,000 or ten million parameters")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--samples", type=int, default=8, help="per prompt")
    parser.add_argument("--new-tokens", type=int, default=40, help="most tokens of a response")
    parser.add_argument("--threads", type=int, default=1, help="of the engine")
    return parser.parse_args()


def configure(options: argparse.Namespace, scratch: Path) -> Config:
    """A run that generates and scores, as its flags would describe it."""
    checkpoint = options.checkpoint or scratch / "model"
    if options.checkpoint is None:
        texts = [f"{number} + {number * 7} = {number * 8}" for number in range(200)]
        tiny_lm.save_checkpoint(checkpoint, texts, vocab_size=512, shape=SHAPES[options.shape], seed=0)
    prompts = scratch / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"input": f"{n} + {n * 7} ="}) + "\n" for n in range(4096)))
    return Config.of(
        hf_checkpoint=str(checkpoint),
        prompt_data=str(prompts),
        apply_chat_template=True,
        rollout_batch_size=options.prompts,
        n_samples_per_prompt=options.samples,
        rollout_max_response_len=options.new_tokens,
        rollout_engine="embedded",
        engine_num_threads=options.threads,
        rm_type="random",
        device="cpu",
    )


def measure(role: RolloutManager, config: Config, rounds: int) -> tuple[list[Cost], list[Cost]]:
    """Costs of both ways, round by round.  The first round warms up."""
    ahead = RolloutDataSourceWithBuffer(config)
    path, engine = [], []
    for rollout_id in range(rounds + 1):
        payload = whole_rollout(ahead, config)
        if rollout_id % 2:
            through, direct = through_path(role, rollout_id), through_engine(role, payload)
        else:
            direct, through = through_engine(role, payload), through_path(role, rollout_id)
        assert direct.tokens == through.tokens, "both ways generate the same"
        if rollout_id:
            engine.append(direct)
            path.append(through)
    return path, engine


def through_path(role: RolloutManager, rollout_id: int) -> Cost:
    start, cpu = time.perf_counter(), tree_cpu(os.getpid())
    result = role.generate(rollout_id)
    seconds = time.perf_counter() - start
    return Cost(seconds, tree_cpu(os.getpid()) - cpu, sum(result.batch.response_lengths))


def through_engine(role: RolloutManager, payload: bytes) -> Cost:
    """The engine's own maximum.  CPU-seconds are of its process; the few of sending are left out."""
    process = role._servers._engines[0].process  # type: ignore[attr-defined]
    connection = http.client.HTTPConnection(urlsplit(role.engine_urls()[0]).netloc, timeout=DEADLINE_S)
    start, cpu = time.perf_counter(), tree_cpu(process.pid)
    connection.request("POST", "/generate", payload, {"Content-Type": "application/json"})
    answer = connection.getresponse().read()
    seconds, cpu = time.perf_counter() - start, tree_cpu(process.pid) - cpu
    connection.close()
    tokens = sum(len(found["meta_info"]["output_token_logprobs"]) for found in json.loads(answer))
    return Cost(seconds, cpu, tokens)


def whole_rollout(source: RolloutDataSourceWithBuffer, config: Config) -> bytes:
    """The request with every sample of the next rollout."""
    tokenizer = load_tokenizer(config.hf_checkpoint)
    params = SamplingSettings(max_response_len=config.rollout_max_response_len).params()
    samples = [sample for group in source.get_samples(config.rollout_batch_size) for sample in group]
    return json.dumps(
        {
            "input_ids": [tokenizer.encode(str(sample.prompt)) for sample in samples],
            "sampling_params": [
                {**params, "sampling_seed": sampling_seed(config.rollout_seed, sample.index or 0)} for sample in samples
            ],
            "return_logprob": True,
        }
    ).encode()


def tree_cpu(root: int) -> float:
    """CPU-seconds of a process and its descendants."""
    return sum(of_process(pid)[0] for pid in tree(root))


def summary(path: list[Cost], engine: list[Cost], options: argparse.Namespace) -> dict[str, object]:
    wall = statistics.median(cost.wall_s for cost in path) / statistics.median(cost.wall_s for cost in engine)
    cpu = statistics.median(cost.cpu_s for cost in path) / statistics.median(cost.cpu_s for cost in engine)
    return {
        "bench": "rollout",
        "options": {name: str(value) for name, value in vars(options).items()},
        "path": asdict(middle(path)),
        "engine": asdict(middle(engine)),
        "path_over_engine_wall": round(wall, 3),
        "path_over_engine_cpu": round(cpu, 3),
        "goal": GOAL,
    }


def middle(costs: list[Cost]) -> Cost:
    """The round with the median wall time."""
    return sorted(costs, key=lambda cost: cost.wall_s)[len(costs) // 2]


if __name__ == "__main__":
    main()
