import pytest

FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


@pytest.mark.parametrize(
    ("flags", "attention", "mlp"),
    [
        ({}, 1, 1),
        (FULL, 2, 2),
        ({"recompute_granularity": "selective"}, 2, 1),
        ({"recompute_granularity": "selective", "recompute_modules": ["mlp"]}, 1, 2),
    ],
    ids=["nothing", "full", "selective", "mlp"],
)
def test_what_the_flags_name_is_computed_again_in_the_backward_pass(config, rollout, on_ranks, flags, attention, mlp):
    def run(make):
        actor = make(config(max_tokens_per_gpu=10_000, **flags))
        layer = actor._chunks[0].decoder.layers[0]
        passes = {"attention": 0, "mlp": 0}

        def counts(name):
            def count(*_):
                passes[name] += 1

            return count

        layer.self_attention.core_attention.register_forward_hook(counts("attention"))
        layer.mlp.register_forward_hook(counts("mlp"))
        actor.train(rollout())
        return passes

    assert on_ranks(1, run) == [{"attention": attention, "mlp": mlp}]
