"""The Megatron trainer against a bare loop over the same Megatron-Core model: same packed samples, same optimizer.

    python tools/bench/trainer_megatron.py

The bare loop computes logits of all tokens by Megatron-Core's output layer and its cross-entropy at response tokens.
Both run in processes of their own, alternating; medians are printed as one JSON line: tokens per CPU-second.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

from miles.megatron import cpu

cpu.install()

import torch  # noqa: E402
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads  # noqa: E402
from megatron.core.models.gpt import GPTModel  # noqa: E402
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy  # noqa: E402
from trainer import CLIP_HIGH, CLIP_LOW, LR, alternating, conditions, make_rollout, measured_trainer  # noqa: E402

from miles.core.config import Config  # noqa: E402
from miles.core.protocols.backend import Rank  # noqa: E402
from miles.core.training.packing import Packing  # noqa: E402
from miles.core.training.plan import plan_rollout  # noqa: E402
from miles.core.types.batch import RolloutBatch  # noqa: E402
from miles.megatron.actor import MegatronActor  # noqa: E402
from miles.megatron.packed_inputs import PackedInputs  # noqa: E402
from miles.megatron.site import PipelineRanks  # noqa: E402

CONTENDERS = ("miles", "bare")


def main() -> None:
    flags = parse_flags()
    if flags.only:
        print(json.dumps(measure(flags)))
        return
    runs = alternating(flags, CONTENDERS)
    medians = {name: statistics.median(of) for name, of in runs.items()}
    share = round(medians["miles"] / medians["bare"], 3)
    print(json.dumps({"bench": "trainer_megatron", **conditions(flags), "tokens_per_cpu_s": medians, "share": share}))


def parse_flags() -> argparse.Namespace:
    return measured_trainer(__doc__, CONTENDERS, samples=64, max_tokens=1024).parse_args()


def measure(flags: argparse.Namespace) -> float:
    """Tokens per CPU-second."""
    torch.set_num_threads(1)
    actor = MegatronActor(run_config(flags), Rank())
    step = actor.train if flags.only == "miles" else bare_step(flags, actor)
    rollouts = [make_rollout(flags, i) for i in range(flags.steps + 1)]
    step(rollouts[0])
    cpu_s = time.process_time()
    for rollout in rollouts[1:]:
        step(rollout)
    cpu_s = time.process_time() - cpu_s
    return round(sum(sum(rollout.total_lengths) for rollout in rollouts[1:]) / cpu_s, 1)


def run_config(flags: argparse.Namespace) -> Config:
    return Config.of(
        train_backend="megatron",
        device="cpu",
        train_dtype="fp32",
        hf_checkpoint=flags.checkpoint,
        rollout_batch_size=flags.samples,
        num_rollout=flags.steps + 1,
        use_dynamic_batch_size=True,
        max_tokens_per_gpu=flags.max_tokens,
        lr=LR,
        eps_clip=CLIP_LOW,
        eps_clip_high=CLIP_HIGH,
    )


def bare_step(flags: argparse.Namespace, actor: MegatronActor) -> Callable[[RolloutBatch], object]:
    """Forward, loss, backward and optimizer step of the actor's own model, on packs that are given to it."""
    (chunk,), updater = actor._chunks, actor._updater
    # Megatron-Core's own end of the forward pass, which computes logits when it is told of no labels.
    chunk._postprocess = lambda **passed: GPTModel._postprocess(chunk, **passed | {"labels": None})
    (wrapped,) = updater._chunks
    assert isinstance(wrapped, DistributedDataParallel)

    def step(rollout: RolloutBatch) -> None:
        (plan,) = plan_rollout(rollout, len(rollout), Packing(flags.max_tokens), PipelineRanks(), torch.device("cpu"))
        advantage_A = torch.tensor(rollout.rewards).repeat_interleave(torch.tensor(rollout.response_lengths))
        for micro_batch in plan.micro_batches:
            inputs = PackedInputs.of(micro_batch, actor._site.layout)
            logits = wrapped(inputs)[0].index_select(0, inputs.rows_U)
            losses = vocab_parallel_cross_entropy(logits.float()[:, None], inputs.targets_U[:, None])
            loss = losses.squeeze(1) @ advantage_A.index_select(0, micro_batch.columns_T)
            (loss / len(advantage_A)).backward()
        finalize_model_grads([wrapped])
        updater.optimizer.step()
        updater.clear()

    return step


if __name__ == "__main__":
    main()
