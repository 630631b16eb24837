"""The trainer against plain PyTorch loops, one padded and one over the trainer's own packed micro-batches: same model,
same samples, same optimizer.

    python tools/bench/trainer.py --lengths lognormal

Each measurement runs in a process of its own; they alternate, and medians are printed as one JSON line: tokens per
CPU-second (prompt and response tokens, padding not counted) and peak memory of each.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from miles.core.config import Config
from miles.core.protocols.backend import Rank
from miles.core.training.micro_batch import MicroBatch
from miles.core.training.packing import Packing
from miles.core.training.plan import plan_rollout
from miles.core.training.ranks import SingleRank
from miles.core.types.batch import RolloutBatch
from miles.fsdp.attention import kernel_name
from miles.fsdp.backend import FsdpBackend
from miles.fsdp.fused_layer import fuse_layers
from miles.fsdp.loading import decoder_layers, load_model

CONTENDERS = ("miles", "padded", "packed")
CLIP_LOW, CLIP_HIGH = 0.2, 0.28
LR = 1e-4


def main() -> None:
    flags = parse_flags()
    if flags.only:
        print(json.dumps(measure(flags)))
        return
    print(json.dumps(summary(flags, alternating(flags, CONTENDERS))))


def parse_flags() -> argparse.Namespace:
    parser = measured_trainer(__doc__, CONTENDERS, samples=256, max_tokens=4096)
    parser.add_argument(
        "--padded-micro-batch", type=int, default=0, help="samples per padded micro-batch; 0: all at once"
    )
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def measured_trainer(text: str, contenders: Sequence[str], *, samples: int, max_tokens: int) -> argparse.ArgumentParser:
    """Flags of a bench of trainers: model, rollouts, and how often."""
    parser = argparse.ArgumentParser(description=text.splitlines()[0])
    parser.add_argument("--lengths", choices=("even", "lognormal"), default="even")
    parser.add_argument("--samples", type=int, default=samples)
    parser.add_argument("--group", type=int, default=8, help="samples per prompt")
    parser.add_argument("--prompt-tokens", type=int, default=14)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--vocab", type=int, default=512)
    parser.add_argument("--max-tokens", type=int, default=max_tokens, help="--max-tokens-per-gpu of the trainer")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", choices=contenders, help=argparse.SUPPRESS)
    parser.add_argument("--checkpoint", help=argparse.SUPPRESS)
    return parser


def alternating(flags: argparse.Namespace, contenders: Sequence[str]) -> dict[str, list[Any]]:
    """What this script prints for each contender in a process of its own, in turns."""
    runs: dict[str, list[Any]] = {name: [] for name in contenders}
    with tempfile.TemporaryDirectory() as directory:
        make_checkpoint(flags, directory)
        for _ in range(flags.repeats):
            for name in contenders:
                command = [sys.executable, *sys.argv, "--only", name, "--checkpoint", directory]
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
                runs[name].append(json.loads(done.stdout.splitlines()[-1]))
    return runs


def conditions(flags: argparse.Namespace) -> dict[str, object]:
    """What a result belongs to."""
    shown = {key: value for key, value in vars(flags).items() if key not in ("only", "checkpoint")}
    return {"machine": platform.processor() or platform.machine(), **shown}


def summary(flags: argparse.Namespace, runs: dict[str, list[dict[str, float]]]) -> dict[str, object]:
    medians = {name: {key: statistics.median(run[key] for run in of) for key in of[0]} for name, of in runs.items()}
    return {
        "bench": "trainer",
        **conditions(flags),
        **medians,
        "speedup": round(medians["miles"]["tokens_per_cpu_s"] / medians["padded"]["tokens_per_cpu_s"], 2),
        "share_of_packed": round(medians["miles"]["tokens_per_cpu_s"] / medians["packed"]["tokens_per_cpu_s"], 3),
    }


def make_checkpoint(flags: argparse.Namespace, directory: str) -> None:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=flags.vocab,
        hidden_size=flags.hidden,
        intermediate_size=3 * flags.hidden,
        num_hidden_layers=flags.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=flags.hidden // 4,
        tie_word_embeddings=True,
    )
    Qwen3ForCausalLM(config).save_pretrained(directory)


def make_rollout(flags: argparse.Namespace, rollout_id: int) -> RolloutBatch:
    rng = np.random.default_rng(rollout_id)
    if flags.lengths == "even":
        responses = rng.integers(25, 36, flags.samples)
    else:
        responses = np.clip(rng.lognormal(np.log(60), 0.9, flags.samples), 16, 512).astype(int)
    prompts = [rng.integers(0, flags.vocab, flags.prompt_tokens) for _ in range(0, flags.samples, flags.group)]
    rewards = tuple(rng.normal(size=flags.samples).tolist())
    return RolloutBatch(
        rollout_id=rollout_id,
        tokens=tuple(
            np.concatenate([prompts[i // flags.group], rng.integers(0, flags.vocab, response)])
            for i, response in enumerate(responses)
        ),
        response_lengths=tuple(responses.tolist()),
        loss_masks=tuple(np.ones(r, np.float32) for r in responses),
        rewards=rewards,
        raw_rewards=rewards,
        truncated=(False,) * flags.samples,
        sample_indices=tuple(range(flags.samples)),
        group_indices=tuple(i // flags.group for i in range(flags.samples)),
    )


def measure(flags: argparse.Namespace) -> dict[str, float]:
    torch.set_num_threads(flags.threads)
    step = {"miles": miles_step, "padded": padded_step, "packed": packed_step}[flags.only](flags)
    rollouts = [make_rollout(flags, i) for i in range(flags.steps + 1)]
    step(rollouts[0])
    cpu, wall = time.process_time(), time.perf_counter()
    for rollout in rollouts[1:]:
        step(rollout)
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    tokens = sum(sum(rollout.total_lengths) for rollout in rollouts[1:])
    return {
        "tokens_per_cpu_s": round(tokens / cpu, 1),
        "cpu_s_per_step": round(cpu / flags.steps, 4),
        "wall_s_per_step": round(wall / flags.steps, 4),
        "peak_rss_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1),
    }


def miles_step(flags: argparse.Namespace) -> Callable[[RolloutBatch], object]:
    config = Config.of(
        train_backend="fsdp",
        device="cpu",
        hf_checkpoint=flags.checkpoint,
        rollout_batch_size=flags.samples,
        use_dynamic_batch_size=True,
        max_tokens_per_gpu=flags.max_tokens,
        lr=LR,
        eps_clip=CLIP_LOW,
        eps_clip_high=CLIP_HIGH,
    )
    return FsdpBackend().create(config, Rank()).train


def padded_step(flags: argparse.Namespace) -> Callable[[RolloutBatch], object]:
    """What a careful script does: right padding, logits at response positions only, one optimizer step."""
    model = AutoModelForCausalLM.from_pretrained(flags.checkpoint, dtype=torch.float32)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=0.0, fused=True)

    def step(rollout: RolloutBatch) -> None:
        size = flags.padded_micro_batch or len(rollout)
        for start in range(0, len(rollout), size):
            padded_loss(model, rollout, range(start, min(start + size, len(rollout)))).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def packed_step(flags: argparse.Namespace) -> Callable[[RolloutBatch], object]:
    """The bare work: forward, logits at response positions, loss, backward, step, on packs that are given to it."""
    model = load_model(flags.checkpoint, kernel_name("sdpa"))
    fuse_layers(decoder_layers(model))
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    packing = Packing(max_tokens=flags.max_tokens)

    def step(rollout: RolloutBatch) -> None:
        (plan,) = plan_rollout(rollout, len(rollout), packing, SingleRank(), torch.device("cpu"))
        for pack in plan.micro_batches:
            packed_loss(model, rollout, pack).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def packed_loss(model: torch.nn.Module, rollout: RolloutBatch, pack: MicroBatch) -> torch.Tensor:
    body = model.base_model(
        input_ids=pack.tokens_P[None], position_ids=pack.positions_P[None], use_cache=False, segments=pack.segments
    )
    logits = model.lm_head(body.last_hidden_state[0][pack.rows_T])
    logp = logits.log_softmax(-1).gather(1, pack.targets_T[:, None])[:, 0]
    lengths = torch.tensor(pack.layout.lengths)
    gain = torch.tensor([rollout.rewards[i] for i in pack.samples]).repeat_interleave(lengths)
    weight = (1.0 / lengths / len(rollout)).repeat_interleave(lengths)
    ratio = (logp - logp.detach()).exp()
    surrogate = torch.min(ratio * gain, ratio.clamp(1 - CLIP_LOW, 1 + CLIP_HIGH) * gain)
    return -(surrogate * weight).sum()


def padded_loss(model: torch.nn.Module, rollout: RolloutBatch, samples: range) -> torch.Tensor:
    width = max(len(rollout.tokens[i]) for i in samples)
    ids = torch.zeros(len(samples), width, dtype=torch.long)
    attended = torch.zeros_like(ids)
    weight = torch.zeros(len(samples), width)
    advantage = torch.zeros(len(samples), width)
    for row, i in enumerate(samples):
        length, response = len(rollout.tokens[i]), rollout.response_lengths[i]
        ids[row, :length] = torch.from_numpy(rollout.tokens[i])
        attended[row, :length] = 1
        weight[row, length - response : length] = 1.0 / response / len(rollout)
        advantage[row] = rollout.rewards[i]
    chosen = weight[:, 1:] > 0
    hidden = model.model(input_ids=ids, attention_mask=attended, use_cache=False).last_hidden_state
    logits = model.lm_head(hidden[:, :-1][chosen])
    logp = logits.log_softmax(-1).gather(1, ids[:, 1:][chosen][:, None])[:, 0]
    ratio = (logp - logp.detach()).exp()
    gain = advantage[:, 1:][chosen]
    surrogate = torch.min(ratio * gain, ratio.clamp(1 - CLIP_LOW, 1 + CLIP_HIGH) * gain)
    return -(surrogate * weight[:, 1:][chosen]).sum()


if __name__ == "__main__":
    main()
