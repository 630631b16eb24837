"""Functions of the user's, found by their dotted paths."""

import sys
import types

import pytest
import torch

CALLS, SEEN = [], []


def note_init(args):
    CALLS.append(("init", torch.distributed.is_initialized()))


def note_log_probs(args, model, store_prefix):
    CALLS.append(("log_probs", store_prefix, len(model)))


def note_step(args, rollout_id, step_id, model, optimizer, opt_param_scheduler):
    CALLS.append(("step", rollout_id, step_id, args.lr, opt_param_scheduler.peak, bool(optimizer.param_groups)))


def sum_weights(args, rollout_id, step_id, model, optimizer, opt_param_scheduler):
    SEEN.append(sum(float(parameter.double().abs().sum()) for chunk in model for parameter in chunk.parameters()))


@pytest.fixture
def paths():
    module = types.ModuleType("hooks_of_a_user")
    functions = {"init": note_init, "log_probs": note_log_probs, "step": note_step, "weights": sum_weights}
    for name, function in functions.items():
        setattr(module, name, function)
    sys.modules[module.__name__] = module
    yield {
        "custom_megatron_init_path": "hooks_of_a_user.init",
        "custom_megatron_before_log_prob_hook_path": "hooks_of_a_user.log_probs",
        "custom_megatron_before_train_step_hook_path": "hooks_of_a_user.step",
    }
    del sys.modules[module.__name__]


def test_hooks_are_called_where_they_say(config, rollout, on_ranks, paths):
    def run(make):
        flags = {"use_kl_loss": True, "kl_loss_coef": 0.1, "num_steps_per_rollout": 2}
        make(config(**flags, **paths)).train(rollout(7))
        return CALLS

    assert on_ranks(1, run)[0] == [
        ("init", True),
        ("log_probs", "ref_", 1),
        ("log_probs", "", 1),
        ("step", 7, 0, 0.01, 0.01, True),
        ("step", 7, 1, 0.01, 0.01, True),
    ]


OVERLAPS = {"overlap_param_gather": True, "overlap_grad_reduce": True}


@pytest.mark.slow
def test_weights_are_whole_when_the_hook_of_a_step_looks_at_them(config, rollout, on_ranks, paths):
    """Also where they are gathered during the pass that follows; and every rank has the same."""
    hook = {"custom_megatron_before_train_step_hook_path": "hooks_of_a_user.weights"}

    def run(make, **overlaps):
        actor = make(config(num_steps_per_rollout=2, **hook, **overlaps))
        steps = [step for number in range(2) for step in actor.train(rollout(number)).steps]
        return steps, list(SEEN)

    (at_once, elsewhere), (late, _) = on_ranks(2, run), on_ranks(2, lambda make: run(make, **OVERLAPS))
    assert at_once == elsewhere == late
    assert len(set(late[1])) == 4


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        ({"num_query_groups": 4}, r"--num-query-groups 4 \(config.json: 2\)"),
        ({"padded_vocab_size": 50}, "--padded-vocab-size 50 must hold the 96 tokens"),
        ({"model_name": "unheard-of"}, "knows no model of model_type .unheard-of."),
    ],
)
def test_flags_that_contradict_the_checkpoint_are_named(config, on_ranks, flags, complaint):
    def run(make):
        with pytest.raises(Exception, match=complaint):
            make(config(**flags))

    on_ranks(1, run)


def test_flags_that_repeat_the_checkpoint_are_welcome(config, rollout, on_ranks):
    flags = {"num_layers": 4, "hidden_size": 32, "normalization": "RMSNorm", "padded_vocab_size": 104}
    assert on_ranks(1, lambda make: len(make(config(**flags)).train(rollout()).steps)) == [1]


def test_a_contradiction_can_be_meant(config, rollout, on_ranks):
    # Another epsilon than the checkpoint's builds a model all the same.
    flags = {"norm_epsilon": 1e-2}

    def run(make):
        with pytest.raises(Exception, match="--norm-epsilon"):
            make(config(**flags))
        return len(make(config(**flags, allow_model_args_mismatch=True)).train(rollout()).steps)

    assert on_ranks(1, run) == [1]
