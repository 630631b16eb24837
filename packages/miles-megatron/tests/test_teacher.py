"""--opd-type megatron: the trainer scores with a teacher of its own, in turn with the policy."""

import pytest
import torch
from safetensors.torch import load_file, save_file

SP = {"tensor_model_parallel_size": 2, "sequence_parallel": True}


@pytest.mark.slow
def test_the_teacher_takes_its_turn_and_answers_at_temperature_one(config, checkpoint, rollout, on_ranks, tmp_path):
    for file in checkpoint().iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = {name: 0.7 * tensor for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    distills = {"use_opd": True, "rollout_temperature": 0.8}

    def alone(make):
        teacher = make(config(hf_checkpoint=str(tmp_path)))
        batch = rollout()
        given = batch.having({"teacher_log_probs": teacher.log_probs(batch)})
        teacher.close()
        return make(config(**distills)).train(given)

    def shared(make):
        actor = make(config(**distills, **SP, opd_type="megatron", opd_teacher_load=str(tmp_path)))
        return actor.train(rollout())

    (expected,) = on_ranks(1, alone)
    report, _ = on_ranks(2, shared)
    name = "rollout/teacher_log_probs"
    assert report.metrics[name] == pytest.approx(expected.metrics[name], rel=1e-4)
    assert report.steps[0] == pytest.approx(expected.steps[0], rel=1e-3, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("layout", [{}, SP, {"context_parallel_size": 2}])
def test_rows_are_filled_to_round_sizes(config, rollout, on_ranks, layout):
    def train(make, **flags):
        actor = make(config(**flags, micro_batch_size=3, optimizer="sgd", lr=0.3))
        lengths, forward = [], actor._chunks[0].forward

        def seen(packed):
            lengths.append(packed.tokens_1L.shape[1])
            return forward(packed)

        actor._chunks[0].forward = seen
        return actor.train(rollout()).steps, lengths, [tensor.clone() for _, tensor in actor.named_weights()]

    ((steps, plain, weights),) = on_ranks(1, train)
    filled = on_ranks(2 if layout else 1, lambda make: train(make, **layout, data_pad_size_multiplier=8))
    assert any(length % 8 for length in plain)
    for own_steps, lengths, _ in filled:
        assert not any(length % 8 for length in lengths)
        assert own_steps[0] == pytest.approx(steps[0], rel=1e-4, abs=1e-6)
    for one, other in zip(filled[0][2], weights, strict=True):  # rank 0 has them whole
        torch.testing.assert_close(one, other, atol=2e-6, rtol=1e-4)
