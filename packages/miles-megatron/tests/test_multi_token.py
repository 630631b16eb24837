"""Layers of multi-token prediction: what they learn, that nothing else does, and their names."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch.nn import functional

PLAIN = {"optimizer": "sgd", "lr": 0.5, "clip_grad": 0.0}
MTP = {"mtp_num_layers": 1, "enable_mtp_training": True, "mtp_loss_scaling_factor": 0.7}
LAYER = "model.layers.3."


@pytest.fixture(scope="session")
def with_mtp(checkpoint, tmp_path_factory):
    """``with_mtp(family)``: a checkpoint whose last layer became one of multi-token prediction."""
    made = {}

    def make(family):
        if family in made:
            return made[family]
        directory = made[family] = tmp_path_factory.mktemp("mtp")
        source = checkpoint(f"{family} long")
        config = json.loads((source / "config.json").read_text())
        config |= {"num_hidden_layers": 3, "num_nextn_predict_layers": 1}
        (directory / "config.json").write_text(json.dumps(config))
        torch.manual_seed(3)
        size = config["hidden_size"]
        own = {
            name: 1.0 + 0.1 * torch.randn(size) for name in ("enorm.weight", "hnorm.weight", "shared_head.norm.weight")
        }
        own["eh_proj.weight"] = 0.2 * torch.randn(size, 2 * size)
        weights = load_file(source / "model.safetensors")
        save_file(weights | {LAYER + name: tensor for name, tensor in own.items()}, directory / "model.safetensors")
        return directory

    return make


def trained(make, config, batch):
    actor = make(config)
    before = {name: tensor.clone() for name, tensor in actor.named_weights()}
    steps = actor.train(batch).steps
    return steps, before, {name: tensor.clone() for name, tensor in actor.named_weights()}


def expected_loss(model, weights, tokens, response):
    """Cross entropy of each response token two tokens after its predictor, in transformers' arithmetic."""
    norm = lambda x, name: functional.rms_norm(x, x.shape[-1:], weights[name], model.config.rms_norm_eps)  # noqa: E731
    ids = torch.from_numpy(tokens)[None]
    mtp_layer, model.model.layers = model.model.layers[-1], model.model.layers[:-1]
    hidden = model.model(ids).last_hidden_state[:, :-1]
    model.model.layers = model.model.layers.append(mtp_layer)
    ahead = norm(model.model.embed_tokens(ids[:, 1:]), LAYER + "enorm.weight")
    joined = torch.cat([ahead, norm(hidden, LAYER + "hnorm.weight")], -1)
    states = functional.linear(joined, weights[LAYER + "eh_proj.weight"])
    length = states.shape[1]
    states = mtp_layer(
        states,
        attention_mask=torch.full((length, length), float("-inf")).triu(1)[None, None],
        position_embeddings=model.model.rotary_emb(states, torch.arange(length)[None]),
    )
    logits = model.lm_head(norm(states, LAYER + "shared_head.norm.weight"))[0, :-1]
    losses = functional.cross_entropy(logits, ids[0, 2:], reduction="none")
    return losses[max(len(tokens) - response - 2, 0) :]


@pytest.mark.parametrize("family", ["deepseek", "glm4 moe"])
def test_the_loss_is_that_of_the_token_after_the_next(config, checkpoint, with_mtp, rollout, on_ranks, family):
    batch, source = rollout(), str(with_mtp(family))
    run = lambda make: trained(make, config("qwen3", **PLAIN, **MTP, hf_checkpoint=source), batch)  # noqa: E731
    ((steps, before, _),) = on_ranks(1, run)
    assert before.keys() == load_file(f"{source}/model.safetensors").keys()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        checkpoint(f"{family} long"), attn_implementation="eager", dtype=torch.float32
    )
    total = count = 0.0
    with torch.no_grad():
        for tokens, response, mask in zip(batch.tokens, batch.response_lengths, batch.loss_masks, strict=True):
            losses = expected_loss(model, before, tokens, response)
            total += float(losses @ torch.from_numpy(mask)[-len(losses) :])
            count += float(mask.sum())
    assert [step["train/mtp_loss"] for step in steps] == pytest.approx([total / count], rel=1e-5)


def test_only_its_layers_learn_from_it_and_nothing_of_the_policy_changes(config, with_mtp, rollout, on_ranks):
    source = str(with_mtp("deepseek"))

    def run(**flags):
        return on_ranks(
            1, lambda make: trained(make, config("qwen3", **PLAIN, hf_checkpoint=source, **flags), rollout())
        )[0]

    _, before, after = run(**MTP)
    _, _, without = run()
    _, _, held = run(mtp_num_layers=1)
    own = {name for name in after if name.startswith(LAYER)}
    assert all(torch.equal(after[name], tensor) for name, tensor in without.items())
    assert without.keys() == after.keys() - own
    # A router's bias and experts without tokens have no gradient.
    still = {name for name in own if torch.equal(after[name], before[name])}
    assert all("e_score_correction_bias" in name or ".experts." in name for name in still)
    assert all(torch.equal(held[name], before[name]) for name in own)


LAYOUTS = {
    "tp sp": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "pp": (2, {"pipeline_model_parallel_size": 2, "num_layers_in_first_pipeline_stage": 2}),
    "cp": (2, {"context_parallel_size": 2}),
    "ep": (2, {"expert_model_parallel_size": 2}),
    "recomputed": (1, {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}),
}


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_train_it_alike(config, with_mtp, rollout, on_ranks, layout):
    count, flags = LAYOUTS[layout]
    base = PLAIN | MTP | {"hf_checkpoint": str(with_mtp("deepseek")), "num_steps_per_rollout": 2}
    run = lambda **more: lambda make: trained(make, config("qwen3", **base, **more), rollout())  # noqa: E731
    (alone,), results = on_ranks(1, run()), on_ranks(count, run(**flags))
    for step, expected in zip(results[0][0], alone[0], strict=True):
        assert step == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert all(result[0] == results[0][0] for result in results)
    for name, tensor in results[0][2].items():
        torch.testing.assert_close(tensor, alone[2][name], atol=2e-6, rtol=1e-4)


def test_layers_that_the_checkpoint_has_not_are_refused(config, on_ranks):
    def run(make):
        with pytest.raises(Exception, match="the checkpoint has 0 layers of multi-token prediction") as caught:
            make(config("qwen3", mtp_num_layers=1))
        return type(caught.value).__name__

    assert on_ranks(1, run) == ["TrainingError"]
