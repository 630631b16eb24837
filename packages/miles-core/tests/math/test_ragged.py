import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from miles.core.math.ragged import Ragged

LENGTHS = st.lists(st.integers(0, 5), max_size=6)


@settings(deadline=None)
@given(LENGTHS)
def test_sums_equal_those_of_each_sample(lengths):
    layout = Ragged(lengths)
    x_T = torch.randn(layout.num_tokens, dtype=torch.float64)
    sums_S = torch.stack([part.sum() for part in layout.split(x_T)]) if lengths else x_T.new_zeros(0)
    torch.testing.assert_close(layout.sum(x_T), sums_S)


@settings(deadline=None)
@given(LENGTHS)
def test_every_token_gets_the_value_of_its_sample(lengths):
    layout = Ragged(lengths)
    x_S = torch.arange(len(lengths), dtype=torch.float64)
    spread_T = layout.spread(x_S)
    assert spread_T.tolist() == [float(s) for s, length in enumerate(lengths) for _ in range(length)]


def test_sums_of_several_columns_at_once():
    layout = Ragged([2, 0, 1])
    x_T2 = torch.tensor([[1.0, 10.0], [2.0, 20.0], [3.0, 30.0]])
    assert layout.sum(x_T2).tolist() == [[3.0, 30.0], [0.0, 0.0], [3.0, 30.0]]


def test_gradients_flow_through_sums_and_spreads():
    layout = Ragged([2, 0, 3])
    x_T = torch.randn(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: layout.spread(layout.sum(x)).square(), (x_T,))


def test_a_pack_without_tokens_has_a_gradient():
    layout = Ragged([0, 0])
    x_T = torch.zeros(0, requires_grad=True)
    layout.sum(x_T).sum().backward()
    assert x_T.grad.shape == (0,)
