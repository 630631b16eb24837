"""Users' functions in the loss, found by dotted path and called as documented."""

import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import pytest
import torch

from miles.core.math.logprobs import LogProbs
from miles.core.math.ragged import Ragged
from miles.core.training.loss_batch import LossBatch
from miles.core.training.objective import ObjectiveSpec, build_objective

ARGS = SimpleNamespace(my_flag=3)


@pytest.fixture
def hooks(monkeypatch):
    module = ModuleType("users_hooks")
    monkeypatch.setitem(sys.modules, "users_hooks", module)
    return module


@pytest.fixture
def batch():
    return LossBatch(
        Ragged([2, 1]),
        torch.tensor([1.0, 1.0, 1.0]),
        advantage_T=torch.tensor([1.0, -1.0, 2.0]),
        old_logp_T=torch.tensor([-1.0, -2.0, -3.0]),
        rollout_logp_T=torch.tensor([-1.0, -1.0, -1.0]),
        total_lengths=(5, 3),
        tokens=(torch.arange(5), torch.arange(3)),
    )


def scores():
    return LogProbs(torch.tensor([-1.0, -2.0, -3.0], requires_grad=True))


def test_a_correction_scales_the_loss_and_takes_tokens_out(hooks, batch):
    seen = {}

    def correct(**given):
        seen.update(given)
        masks = [mask.clone() for mask in given["loss_masks"]]
        masks[0][1] = 0
        return given["pg_loss"] * 0.5, masks, {"mine": torch.tensor([1.0, 2.0, 3.0])}

    hooks.correct = correct
    spec = ObjectiveSpec(use_tis=True, custom_tis_function_path="users_hooks.correct")
    given = scores()
    output = build_objective(spec, ARGS)(given, batch)
    output.loss.backward()
    assert seen["args"] is ARGS
    assert [x.tolist() for x in seen["train_log_probs"]] == [[-1.0, -2.0], [-3.0]]
    assert [x.tolist() for x in seen["rollout_log_probs"]] == [[-1.0, -1.0], [-1.0]]
    assert (tuple(seen["total_lengths"]), tuple(seen["response_lengths"])) == ((5, 3), (2, 1))
    assert given.logp_T.grad.tolist() == [-0.25, 0.0, -1.0]
    assert output.token_metrics["mine"] == 1.5 + 3.0


def test_a_reducer_replaces_the_reduction_of_the_policy_loss_alone(hooks, batch):
    def make_reducer(total_lengths, response_lengths, loss_masks, calculate_per_token_loss):
        assert (total_lengths, response_lengths, calculate_per_token_loss) == ((5, 3), (2, 1), False)
        weights = torch.cat(list(loss_masks)) / 1000.0
        return lambda x: (x * weights).sum()

    hooks.make_reducer = make_reducer
    spec = ObjectiveSpec(custom_pg_loss_reducer_function_path="users_hooks:make_reducer")
    output = build_objective(spec, ARGS)(scores(), batch)
    torch.testing.assert_close(output.loss, torch.tensor(-2.0 / 1000))
    assert output.token_metrics["ess_ratio"] == 2.0


def test_a_loss_function_gets_logits_and_columns(hooks, batch):
    def loss(args, batch, logits, sum_of_sample_mean):
        assert args.my_flag == 3
        assert [len(tokens) for tokens in batch["tokens"]] == [5, 3]
        assert [x.tolist() for x in batch["advantages"]] == [[1.0, -1.0], [2.0]]
        assert "ref_log_probs" not in batch
        value = sum_of_sample_mean(logits[:3, 0])
        return value, {"mine": value.detach() * 2}

    hooks.loss = loss
    spec = ObjectiveSpec(loss_type="custom_loss", custom_loss_function_path="users_hooks.loss")
    objective = build_objective(spec, ARGS)
    logits_NV = torch.ones(8, 4, requires_grad=True)
    output = objective(logits_NV, batch)
    output.loss.backward()
    assert objective.consumes == "logits"
    assert {name: x.item() for name, x in output.token_metrics.items()} == {"loss": 2.0, "mine": 4.0}
    assert logits_NV.grad[:, 0].tolist() == [0.5, 0.5, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0]


def test_lengths_are_required(hooks, batch):
    hooks.correct = lambda **given: (given["pg_loss"], given["loss_masks"], {})
    spec = ObjectiveSpec(use_tis=True, custom_tis_function_path="users_hooks.correct")
    with pytest.raises(ValueError, match="total_lengths"):
        build_objective(spec, ARGS)(scores(), replace(batch, total_lengths=None))
