"""Every algorithm learns the sums of the quick start: ``python tools/recipes/algorithms.py [NAME ...]``.

Each starts from the model that the quick start has taught by demonstrations, practises for a few rollouts with the real
engine, router and verifier, and prints the share of held-out sums answered right before and after.  Distillation learns
from a teacher that has practised first.  Nothing is downloaded.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

import quickstart
from stage import Stage, Value

from miles.core.report import evaluations
from miles.core.run_directory import RunDirectory

PPO: dict[str, Value] = {"advantage-estimator": "ppo", "critic-lr": 5e-4, "num-critic-only-steps": 2}
SEVERAL_STEPS: dict[str, Value] = {"global-batch-size": 128}
WHITENED: dict[str, Value] = {"normalize-advantages": True}
TIS: dict[str, Value] = {"use-tis": True} | SEVERAL_STEPS

ALGORITHMS: dict[str, dict[str, Value]] = {
    "grpo": {},
    "dr-grpo": {"disable-grpo-std-normalization": True, "calculate-per-token-loss": True},
    "dapo": {
        "eps-clip-high": 0.28,
        "calculate-per-token-loss": True,
        "dynamic-sampling-filter-path": "reward_nonzero_std",
        "over-sampling-batch-size": 48,
    }
    | SEVERAL_STEPS,
    "gspo": {"advantage-estimator": "gspo", "eps-clip": 3e-4, "eps-clip-high": 4e-4} | SEVERAL_STEPS,
    "ppo": PPO,
    "reinforce++": {"advantage-estimator": "reinforce_plus_plus"} | WHITENED,
    "reinforce++-baseline": {"advantage-estimator": "reinforce_plus_plus_baseline"} | WHITENED,
    "kl-in-reward": {"advantage-estimator": "reinforce_plus_plus", "kl-coef": 0.01, "kl-loss-type": "k1"} | WHITENED,
    "kl-in-loss": {"use-kl-loss": True, "kl-loss-coef": 0.01, "kl-loss-type": "low_var_kl"},
    "tis": TIS,
    "mis": {"custom-tis-function-path": "mis", "use-rs": True} | TIS,
    "engine-log-probs": {"use-rollout-logprobs": True} | SEVERAL_STEPS,
    "opsm-entropy": {"use-opsm": True, "entropy-coef": 1e-3} | SEVERAL_STEPS,
    "distillation": {"advantage-estimator": "on_policy_distillation"},
    "grpo-distillation": {"use-opd": True, "opd-kl-coef": 0.1},
}
DISTILLED = ("distillation", "grpo-distillation")


def main() -> None:
    """Teach once, let every algorithm practise, print a table."""
    options = parse_options()
    output: Path = options.output
    model, data = quickstart.prepare(output, options.seed)
    quickstart.demonstrations_stage(output, model, data, options.seed, num_rollout=80).run()
    practice = quickstart.practice_stage(output, data, options.seed, num_rollout=options.steps)
    common = dict(practice.flags) | {"lr": options.lr, "eval-interval": options.steps, "save-interval": options.steps}

    def run(name: str, flags: Mapping[str, Value]) -> RunDirectory:
        stage = Stage(output / "algorithms" / name, options.steps, common | flags)
        stage.run()
        return RunDirectory(stage.directory)

    teacher = output / "teacher"
    if any(name in DISTILLED for name in options.names):
        run("teacher", {"save-hf": teacher})
    rows = []
    for name in options.names:
        taught: dict[str, Value] = {"opd-teacher-load": teacher} if name in DISTILLED else {}
        rows.append(row(name, run(name, ALGORITHMS[name] | taught)))
    print("\n" + "\n".join(["| Algorithm | right before | right after | rollouts |", "|---|---|---|---|", *rows]))


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(ALGORITHMS), metavar="NAME", help=", ".join(ALGORITHMS))
    parser.add_argument("--seed", type=int, default=0, help="of data, weights and sampling (default: 0)")
    parser.add_argument("--steps", type=int, default=15, help="rollouts of each algorithm (default: 15)")
    parser.add_argument("--lr", type=float, default=2e-4, help="learning rate of all (default: 2e-4)")
    parser.add_argument("--output", type=Path, default=Path("runs") / "algorithms", help="where everything is made")
    options = parser.parse_args()
    if unknown := sorted(set(options.names) - set(ALGORITHMS)):
        parser.error(f"unknown: {', '.join(unknown)}; there are {', '.join(ALGORITHMS)}")
    return options


def row(name: str, run: RunDirectory) -> str:
    """A line of the table."""
    found = evaluations(run)
    before, after = found[0], found[-1]
    return f"| {name} | {before.pass_rate:.1%} | {after.pass_rate:.1%} | {after.rollout_id} |"


if __name__ == "__main__":
    main()
