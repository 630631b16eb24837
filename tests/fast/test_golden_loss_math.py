"""Losses, gradients, advantages and metrics against numbers of the public reference implementation.

The environment variable MILES_GOLDEN names another file of the same form.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from miles.core.advantages.estimate import AdvantageInputs
from miles.core.advantages.whiten import whiten
from miles.core.math.kl import approx_kl
from miles.core.math.logprobs import linear_logprobs, token_logprobs
from miles.core.math.policy import clipped_surrogate
from miles.core.math.ragged import Ragged
from miles.core.training.loss_batch import LossBatch, LossOutput
from miles.core.training.metric_sums import MetricSums
from miles.core.training.objective import build_advantages, build_objective
from miles.core.training.objective_spec import ObjectiveSpec

GOLDEN = Path(os.environ.get("MILES_GOLDEN", Path(__file__).parent / "data" / "loss-math.json"))

# What a case's flags are when it does not give them; they differ from the command line's in eps_clip_high.
DEFAULTS = {"eps_clip_high": 0.2}

Case = dict[str, Any]
Packed = list[list[float]]


def load() -> tuple[dict[str, float], list[Case]]:
    golden = json.loads(GOLDEN.read_text())
    return golden["tolerance"], golden["cases"]


TOLERANCE, CASES = load()


def cases(*kinds: str) -> pytest.MarkDecorator:
    chosen = [(number, case) for number, case in enumerate(CASES) if case["kind"] in kinds]
    return pytest.mark.parametrize("case", [pytest.param(case, id=f"{case['kind']}-{n}") for n, case in chosen])


def close(actual: torch.Tensor | float, expected: Any) -> None:
    torch.testing.assert_close(
        torch.as_tensor(actual, dtype=torch.float64).detach(),
        torch.as_tensor(expected, dtype=torch.float64),
        rtol=TOLERANCE["rtol"],
        atol=TOLERANCE["atol"],
    )


def flat(ragged: Packed) -> torch.Tensor:
    return torch.tensor([x for sample in ragged for x in sample], dtype=torch.float32)


def layout(ragged: Packed) -> Ragged:
    return Ragged([len(sample) for sample in ragged])


def spec_of(flags: dict[str, Any]) -> tuple[ObjectiveSpec, float]:
    """The objective's flags, and the temperature."""
    given = DEFAULTS | flags
    temperature = given.pop("rollout_temperature", 1.0)
    return ObjectiveSpec(**given), temperature


def predicting_rows(case: Case) -> torch.Tensor:
    """Row, in samples laid end to end, that predicts each response token: the one before it."""
    rows, end = [], 0
    for total, response in zip(case["total_lengths"], case["response_lengths"], strict=True):
        end += total
        rows += range(end - response - 1, end - 1)
    return torch.tensor(rows, dtype=torch.long)


def loss_batch(case: Case) -> LossBatch:
    columns = {
        "advantage_T": "advantages",
        "return_T": "returns",
        "old_logp_T": "old_log_probs",
        "ref_logp_T": "ref_log_probs",
        "rollout_logp_T": "rollout_log_probs",
        "old_value_T": "old_values",
    }
    return LossBatch(
        layout=layout(case["loss_masks"]),
        mask_T=flat(case["loss_masks"]),
        **{name: flat(case[key]) for name, key in columns.items() if key in case},
    )


def check_metrics(output: LossOutput, expected: dict[str, float]) -> None:
    sums = MetricSums()
    sums.add(output)
    means = sums.means(denominator=1.0, num_samples=1)
    for name, value in expected.items():
        close(means[name], value)


LogProbsOfLogits = Callable[..., Any]


def by_head(logits_TV: torch.Tensor, targets_T: torch.Tensor, **options: Any) -> Any:
    """Logits as the product of hidden states and a head that is the identity, a few tokens at a time."""
    return linear_logprobs(logits_TV, torch.eye(logits_TV.shape[1]), targets_T, chunk_size=5, **options)


by_plain_softmax: LogProbsOfLogits = token_logprobs
PATHS = pytest.mark.parametrize("logprobs", [by_head, by_plain_softmax], ids=["chunked", "plain"])


@cases("approx_kl")
def test_kl_estimates(case: Case) -> None:
    inputs = case["input"]
    log_ratio_T = torch.tensor(inputs["log_probs"]) - torch.tensor(inputs["ref_log_probs"])
    ratio = inputs.get("importance_ratio")
    kl_T = approx_kl(log_ratio_T, inputs["kl_loss_type"], None if ratio is None else torch.tensor(ratio))
    close(kl_T, case["expected"])


@cases("clipped_policy_loss")
def test_clipped_policy_loss(case: Case) -> None:
    inputs = case["input"]
    result = clipped_surrogate(
        -torch.tensor(inputs["log_ratio_neg"]),
        torch.tensor(inputs["advantages"]),
        clip_low=inputs["eps_clip"],
        clip_high=inputs["eps_clip_high"],
        dual_clip=inputs["eps_clip_c"],
    )
    close(result.loss_T, case["expected"]["loss"])
    close(result.clipped_T, case["expected"]["clipped"])


@cases("advantages")
def test_advantages(case: Case) -> None:
    inputs = case["input"]
    names = ("advantage_estimator", "gamma", "lambd", "kl_coef")
    rule = build_advantages(ObjectiveSpec(**{name: inputs[name] for name in names}))
    advantages = rule.estimator(
        AdvantageInputs(
            layout=layout(inputs["loss_masks"]),
            mask_A=flat(inputs["loss_masks"]),
            reward_S=torch.tensor(inputs["rewards"]),
            kl_A=flat(inputs["kl"]),
            value_A=flat(inputs["values"]) if inputs["values"] is not None else None,
        ),
        rule.options,
    )
    close(advantages.advantage_A, flat(case["expected"]["advantages"]))
    close(advantages.return_A, flat(case["expected"]["returns"]))


@cases("whiten_advantages")
def test_whitened_advantages(case: Case) -> None:
    inputs = case["input"]
    close(whiten(flat(inputs["advantages"]), flat(inputs["loss_masks"])), flat(case["expected"]))


@PATHS
@cases("policy_loss_batch", "sft_loss_batch")
def test_losses_of_logits(case: Case, logprobs: LogProbsOfLogits) -> None:
    inputs, expected = case["input"], case["expected"]
    spec, temperature = spec_of(inputs["flags"])
    if case["kind"] == "sft_loss_batch":
        spec = replace(spec, loss_type="sft_loss")
    objective = build_objective(spec, args=spec)
    logits_NV = torch.tensor(inputs["logits"], requires_grad=True)
    rows_T, batch = predicting_rows(inputs), loss_batch(inputs)
    tokens_N = torch.tensor([token for sample in inputs["tokens"] for token in sample])
    scores = logprobs(
        logits_NV[rows_T], tokens_N[rows_T + 1], temperature=temperature, with_entropy=spec.entropy_coef != 0
    )
    (batch,) = objective.prepare([batch])
    output = objective(scores, batch)
    check_metrics(output, expected.get("metrics", {}))
    if "loss" in expected:
        close(output.loss, expected["loss"])
    if "grad_logits" in expected:
        output.loss.backward()
        close(logits_NV.grad, expected["grad_logits"])


@cases("value_loss_batch")
def test_value_loss(case: Case) -> None:
    inputs, expected = case["input"], case["expected"]
    spec, _ = spec_of(inputs["flags"])
    objective = build_objective(spec, spec, role="critic")
    values_N = torch.tensor(inputs["values"], requires_grad=True)
    output = objective(values_N[predicting_rows(inputs)], loss_batch(inputs))
    output.loss.backward()
    check_metrics(output, expected["metrics"])
    close(output.loss, expected["loss"])
    close(values_N.grad, expected["grad_values"])


def test_every_case_is_checked() -> None:
    known = {
        "approx_kl",
        "clipped_policy_loss",
        "advantages",
        "whiten_advantages",
        "policy_loss_batch",
        "sft_loss_batch",
        "value_loss_batch",
    }
    kinds: Sequence[str] = [case["kind"] for case in CASES]
    assert kinds
    assert set(kinds) <= known
