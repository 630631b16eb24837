"""Models and layers of the user's own, found by their dotted paths."""

import sys
from pathlib import Path

import pytest
import torch

from miles.core.errors import TrainingError

sys.path.insert(0, str(Path(__file__).parent))

import own_models

PP = {"pipeline_model_parallel_size": 2}


def trained(make, config, rollout, role="actor"):
    """The first step, and the weights before and after it."""
    actor = make(config, role)
    before = {name: tensor.clone() for name, tensor in actor.named_weights()}
    step = actor.train(rollout()).steps[0]
    return step, before, {name: tensor.clone() for name, tensor in actor.named_weights()}


def test_a_provider_may_change_the_model_as_it_would_be(config, rollout, on_ranks):
    flags = {"custom_model_provider_path": "own_models.frozen_embedding"}
    _, before, after = on_ranks(2, lambda make: trained(make, config(**flags, **PP), rollout))[0]
    changed = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert set(after) - changed == {"model.embed_tokens.weight"}


def test_a_model_of_the_users_own_trains_like_the_model_it_is(config, rollout, on_ranks):
    def run(make):
        own = config(custom_model_provider_path="own_models.from_scratch")
        found, expected = trained(make, own, rollout)[0], trained(make, config(), rollout)[0]
        return found, expected, own_models.calls

    ((found, expected, calls),) = on_ranks(1, run)
    assert found == expected
    assert "Own" in calls


def test_layers_of_the_users_own_are_built_from_args_and_configuration(config, rollout, on_ranks):
    def run(make):
        found = trained(make, config(spec=["own_models", "spec"]), rollout)[0]
        return found, trained(make, config(), rollout)[0], own_models.calls

    ((found, expected, calls),) = on_ranks(1, run)
    assert found == expected
    assert calls == [("megatron", 4, None)]


def test_what_is_no_model_is_refused(config, on_ranks):
    def run(make):
        with pytest.raises(TrainingError, match="returned object; expected a GPTModel"):
            make(config(custom_model_provider_path="own_models.something_else"))

    on_ranks(1, run)
