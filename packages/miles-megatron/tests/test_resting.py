"""Trainer and engines by turns: everything leaves, every byte is counted, and training goes on as if nothing was."""

import pytest
import torch

from miles.megatron.resting import RestingMemory

SP = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True}
RUNS = {
    "dp, whole weights": ("qwen3", 1, {"use_distributed_optimizer": False}),
    "dp overlapped, adapters": (
        "qwen3",
        2,
        OVERLAP | {"lora_rank": 4},
    ),
    "tp, half precision": ("qwen3 tied", 2, SP | {"train_dtype": "bf16"}),
    "experts": ("qwen3 moe", 2, {"expert_model_parallel_size": 2}),
}
FAST = {"dp, whole weights"}


def held_bytes(role):
    """Of the storages of everything that a role trains with, each once."""
    chunks, updater = role._chunks, role._updater
    tensors = [tensor for chunk in chunks for tensor in (*chunk.parameters(), *chunk.buffers())]
    tensors += [*updater.state_tensors(), *updater.gradients()]
    return sum({storage._cdata: storage.nbytes() for storage in (one.untyped_storage() for one in tensors)}.values())


def trained(role, rollouts, between=lambda role: None):
    """Metrics of the steps, and the weights after them."""
    steps = []
    for batch in rollouts:
        steps += role.train(batch).steps
        between(role)
    return steps, {name: tensor.clone() for name, tensor in role.named_weights()}


@pytest.mark.parametrize("name", [one if one in FAST else pytest.param(one, marks=pytest.mark.slow) for one in RUNS])
def test_a_run_that_gives_its_memory_up_between_steps_is_the_same_bit_for_bit(config, rollout, on_ranks, name):
    family, count, flags = RUNS[name]
    moved = []

    def rest(role):
        held = held_bytes(role)
        moved.append((held, role.offload(), held_bytes(role)))
        role.onload()
        moved[-1] += (held_bytes(role),)

    def run(make):
        kept, resting = (make(config(family, **flags)) for _ in range(2))
        rollouts = [rollout(number) for number in range(2)]
        return trained(kept, rollouts), trained(resting, rollouts, rest), moved

    for kept, rested, seen in on_ranks(count, run):
        assert rested[0] == kept[0]
        assert all(torch.equal(tensor, kept[1][name]) for name, tensor in rested[1].items())
        for held, counted, left, again in seen:
            assert held == counted == again > 0
            assert left == 0


def test_a_view_sees_its_values_again_and_a_storage_is_counted_once():
    whole = torch.arange(10.0)
    part, gradients = whole[3:5], torch.ones(4)
    memory = RestingMemory()
    assert memory.take([whole, part], zeros=[gradients]) == 56
    assert whole.untyped_storage().nbytes() == gradients.untyped_storage().nbytes() == 0
    memory.give_back()
    assert part.tolist() == [3.0, 4.0]
    assert whole.tolist() == list(range(10))
    assert gradients.tolist() == [0.0] * 4
