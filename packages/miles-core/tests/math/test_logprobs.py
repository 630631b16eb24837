import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from miles.core.math.logprobs import LogProbs, linear_logprobs, token_logprobs
from miles.core.oracle import distribution

SHAPES = st.fixed_dictionaries(
    {
        "tokens": st.integers(0, 9),
        "hidden": st.integers(1, 5),
        "vocabulary": st.integers(1, 7),
        "chunk_size": st.integers(1, 10) | st.none(),
        "temperature": st.sampled_from([1.0, 0.6, 1.7]),
        "with_bias": st.booleans(),
        "seed": st.integers(0, 2**31),
    }
)


def head(tokens, hidden, vocabulary, with_bias, seed, dtype=torch.float64, **_):
    draw = torch.Generator().manual_seed(seed)
    hidden_TD = torch.randn(tokens, hidden, generator=draw, dtype=dtype, requires_grad=True)
    weight_VD = torch.randn(vocabulary, hidden, generator=draw, dtype=dtype, requires_grad=True)
    bias_V = torch.randn(vocabulary, generator=draw, dtype=dtype, requires_grad=True) if with_bias else None
    return hidden_TD, weight_VD, bias_V, torch.randint(vocabulary, (tokens,), generator=draw)


def gradients(scores: LogProbs, inputs, seed: int):
    draw = torch.Generator().manual_seed(seed)
    total = sum(x @ torch.randn(len(x), generator=draw, dtype=x.dtype) for x in scores if x is not None)
    return torch.autograd.grad(total, [x for x in inputs if x is not None])


@settings(max_examples=60, deadline=None)
@given(SHAPES, st.booleans())
def test_chunked_scores_and_gradients_equal_those_of_plain_logits(shape, with_entropy):
    hidden_TD, weight_VD, bias_V, target_T = head(**shape)
    options = {"temperature": shape["temperature"], "with_entropy": with_entropy}
    chunked = linear_logprobs(hidden_TD, weight_VD, target_T, bias_V=bias_V, chunk_size=shape["chunk_size"], **options)
    logits_TV = torch.nn.functional.linear(hidden_TD, weight_VD, bias_V)
    plain = token_logprobs(logits_TV, target_T, **options)
    torch.testing.assert_close(chunked, plain)
    inputs = (hidden_TD, weight_VD, bias_V)
    torch.testing.assert_close(gradients(chunked, inputs, shape["seed"]), gradients(plain, inputs, shape["seed"]))


@settings(max_examples=30, deadline=None)
@given(SHAPES)
def test_scores_equal_the_oracle(shape):
    hidden_TD, weight_VD, _, target_T = head(**shape)
    scores = linear_logprobs(hidden_TD, weight_VD, target_T, temperature=shape["temperature"], with_entropy=True)
    logits = (hidden_TD @ weight_VD.T).detach().numpy()
    logp = distribution.token_logprobs(logits, target_T.numpy(), shape["temperature"])
    np.testing.assert_allclose(scores.logp_T.detach().numpy(), logp.reshape(-1), rtol=1e-9, atol=1e-12)
    entropy = distribution.entropy(logits, shape["temperature"])
    np.testing.assert_allclose(scores.entropy_T.detach().numpy(), entropy, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("chunk_size", [None, 2])
@pytest.mark.parametrize("with_entropy", [False, True])
def test_gradients_equal_numerical_ones(chunk_size, with_entropy):
    hidden_TD, weight_VD, bias_V, target_T = head(5, 3, 4, True, seed=0)

    def scores(hidden_TD, weight_VD, bias_V):
        found = linear_logprobs(
            hidden_TD,
            weight_VD,
            target_T,
            bias_V=bias_V,
            temperature=0.8,
            with_entropy=with_entropy,
            chunk_size=chunk_size,
        )
        return tuple(x for x in found if x is not None)

    assert torch.autograd.gradcheck(scores, (hidden_TD, weight_VD, bias_V))


@pytest.mark.parametrize("frozen", ["hidden", "weight", "bias"])
def test_a_frozen_input_gets_no_gradient(frozen):
    hidden_TD, weight_VD, bias_V, target_T = head(5, 3, 4, True, seed=1)
    inputs = {"hidden": hidden_TD, "weight": weight_VD, "bias": bias_V}
    inputs[frozen].requires_grad_(False)
    linear_logprobs(hidden_TD, weight_VD, target_T, bias_V=bias_V, chunk_size=2).logp_T.sum().backward()
    assert [name for name, x in inputs.items() if x.grad is None] == [frozen]


def test_the_gradient_of_the_entropy_alone():
    hidden_TD, weight_VD, _, target_T = head(5, 3, 4, False, seed=2)
    chunked = linear_logprobs(hidden_TD, weight_VD, target_T, with_entropy=True, chunk_size=2)
    plain = token_logprobs(hidden_TD @ weight_VD.T, target_T, with_entropy=True)
    found, expected = (torch.autograd.grad(x.entropy_T.sum(), [hidden_TD, weight_VD]) for x in (chunked, plain))
    torch.testing.assert_close(found, expected)


def test_half_precision_inputs_are_scored_in_fp32():
    exact = head(40, 16, 30, False, seed=3, dtype=torch.float32)
    half = [x.detach().bfloat16().requires_grad_() for x in exact[:2]]
    widened = [x.detach().float().requires_grad_() for x in half]
    found = linear_logprobs(*half, exact[3], chunk_size=7)
    expected = linear_logprobs(*widened, exact[3])
    assert found.logp_T.dtype == torch.float32
    torch.testing.assert_close(found.logp_T, expected.logp_T)
    found.logp_T.sum().backward()
    expected.logp_T.sum().backward()
    for narrow, wide in zip(half, widened, strict=True):
        assert narrow.grad.dtype == torch.bfloat16
        torch.testing.assert_close(narrow.grad, wide.grad.bfloat16())


class LargestResult(TorchDispatchMode):
    """Watches for the largest tensor that any operation makes."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.numel = max(self.numel, result.numel())
        return result


def test_logits_of_all_tokens_are_never_held():
    hidden_TD, weight_VD, _, target_T = head(64, 2, 50, False, seed=4)
    with LargestResult() as largest:
        scores = linear_logprobs(hidden_TD, weight_VD, target_T, with_entropy=True, chunk_size=8)
        (scores.logp_T.sum() + scores.entropy_T.sum()).backward()
    assert largest.numel == 8 * 50


def test_an_unlikely_token_keeps_its_precision():
    logits_TV = torch.tensor([[0.0, 200.0]])
    scores = linear_logprobs(logits_TV, torch.eye(2), torch.tensor([0]))
    assert scores.logp_T.item() == -200.0


@pytest.mark.parametrize("temperature", [0.0, -1.0])
def test_a_temperature_must_be_positive(temperature):
    with pytest.raises(ValueError, match="temperature"):
        linear_logprobs(torch.ones(1, 1), torch.ones(1, 1), torch.zeros(1, dtype=torch.long), temperature=temperature)
