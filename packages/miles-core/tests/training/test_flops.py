import json

import pytest

from miles.core.training.flops import ModelFlops

DENSE = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "intermediate_size": 128, "vocab_size": 500,
}  # fmt: skip


def test_a_token_is_worth_two_operations_a_weight_and_attention_grows_with_the_square():
    flops = ModelFlops.of_config(DENSE)
    weights = 2 * (64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 128) + 64 * 500
    assert flops.forward([1]) == 2 * weights + 4 * 2 * 64
    assert flops.forward([10, 10]) == 2 * flops.forward([10])
    assert flops.forward([20]) - 2 * flops.forward([10]) == 4 * 2 * 64 * (20 * 21 / 2 - 2 * 10 * 11 / 2)


def test_of_experts_only_the_chosen_ones_count():
    experts = {**DENSE, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    dense, sparse = ModelFlops.of_config(DENSE), ModelFlops.of_config(experts)
    assert dense.per_token - sparse.per_token == 2 * 2 * 64 * (3 * 128 - 3 * 2 * 32 - 8)


def test_models_that_are_not_understood_have_no_rates(tmp_path):
    assert ModelFlops.of_config({**DENSE, "kv_lora_rank": 8}) is None
    assert ModelFlops.of_config({"d_model": 64}) is None
    assert ModelFlops.of_config({**DENSE, "n_routed_experts": 8, "num_experts_per_tok": 2}) is None
    assert ModelFlops.of_config({**DENSE, "num_experts": 8, "moe_topk": 2}) is None
    assert ModelFlops.of_checkpoint(None) is None
    assert ModelFlops.of_checkpoint(str(tmp_path)) is None
    (tmp_path / "config.json").write_text(json.dumps({"text_config": DENSE}))
    assert ModelFlops.of_checkpoint(str(tmp_path)) == ModelFlops.of_config(DENSE)


def test_training_is_worth_three_passes():
    rates = ModelFlops(1e12, 0.0).rates([5, 5], {"actor_train": 2.0, "log_probs": 1.0, "data_preprocess": 1.0}, 5)
    assert rates == {"perf/actor_train_tflops": pytest.approx(3.0), "perf/log_probs_tflops": pytest.approx(2.0)}
