"""CPU time of the loss mathematics: log-probabilities and gradients from hidden states, and the objective around them.

    python tools/bench/loss_math.py

One thread.  Contenders take turns; each line is JSON with the median of every contender in milliseconds of CPU time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping

import torch

from miles.core.math.logprobs import LogProbs, linear_logprobs, token_logprobs
from miles.core.math.ragged import Ragged
from miles.core.training.loss_batch import LossBatch
from miles.core.training.metric_sums import MetricSums
from miles.core.training.objective import ObjectiveSpec, build_objective

# tokens, hidden size, vocabulary: the quick start's model, a small one, one with a large vocabulary
HEADS = ((8192, 64, 64), (8192, 128, 512), (2048, 256, 8192), (1024, 256, 50000))
OBJECTIVES: Mapping[str, ObjectiveSpec] = {
    "grpo": ObjectiveSpec(),
    "gspo": ObjectiveSpec(advantage_estimator="gspo", use_opsm=True),
    "grpo_kl_entropy_tis": ObjectiveSpec(
        use_kl_loss=True, kl_loss_coef=0.1, kl_loss_type="low_var_kl", entropy_coef=0.01, use_tis=True
    ),
    "grpo_mis": ObjectiveSpec(use_tis=True, use_rs=True, rs_veto_threshold=1e-4),
}


def medians(contenders: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Milliseconds of CPU time of each contender, which take turns; the first round warms up."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds + 1):
        for name, run in contenders.items():
            start = time.process_time()
            run()
            times[name].append(time.process_time() - start)
    return {name: round(statistics.median(taken[1:]) * 1e3, 3) for name, taken in times.items()}


def head_contenders(tokens: int, hidden: int, vocabulary: int) -> dict[str, Callable[[], object]]:
    """Ways to the gradients of ``sum(g * logp)``."""
    hidden_TD = torch.randn(tokens, hidden, requires_grad=True)
    weight_VD = (torch.randn(vocabulary, hidden) * 0.02).requires_grad_()
    target_T, grad_T = torch.randint(vocabulary, (tokens,)), torch.randn(tokens)

    def gradients(logp_T: torch.Tensor) -> object:
        return torch.autograd.grad(logp_T @ grad_T, [hidden_TD, weight_VD])

    def cross_entropy() -> object:
        return gradients(-torch.nn.functional.cross_entropy(hidden_TD @ weight_VD.T, target_T, reduction="none"))

    return {
        "kept": lambda: gradients(linear_logprobs(hidden_TD, weight_VD, target_T, chunk_size=tokens).logp_T),
        "chunked": lambda: gradients(linear_logprobs(hidden_TD, weight_VD, target_T).logp_T),
        "plain_log_softmax": lambda: gradients(token_logprobs(hidden_TD @ weight_VD.T, target_T).logp_T),
        "plain_cross_entropy": cross_entropy,
    }


def objective_step(spec: ObjectiveSpec, num_samples: int = 256, mean_length: int = 32) -> Callable[[], object]:
    """One micro-batch from its columns to gradients and metrics."""
    objective = build_objective(spec, spec)
    lengths = torch.randint(mean_length // 2, mean_length * 3 // 2, (num_samples,)).tolist()
    tokens = sum(lengths)
    logp_T, entropy_T = ((-torch.rand(tokens)).requires_grad_() for _ in range(2))
    columns = {name: -torch.rand(tokens) for name in ("old_logp_T", "ref_logp_T", "rollout_logp_T", "advantage_T")}

    def step() -> object:
        batch = LossBatch(layout=Ragged(lengths), mask_T=torch.ones(tokens), **columns)
        output = objective(LogProbs(logp_T, entropy_T), batch)
        torch.autograd.grad(output.loss, [logp_T])
        sums = MetricSums()
        sums.add(output)
        return sums.means(denominator=float(num_samples), num_samples=num_samples)

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    torch.manual_seed(0)
    for tokens, hidden, vocabulary in HEADS:
        shape = {"tokens": tokens, "hidden": hidden, "vocabulary": vocabulary}
        print(json.dumps(shape | medians(head_contenders(tokens, hidden, vocabulary), rounds)), flush=True)
    steps = {name: objective_step(spec) for name, spec in OBJECTIVES.items()}
    print(json.dumps({"samples": 256, "tokens": 8192} | medians(steps, 10 * rounds)))


if __name__ == "__main__":
    main()
