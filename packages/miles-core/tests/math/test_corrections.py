import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from miles.core.math.corrections import icepop_weights, truncated_weights
from miles.core.oracle import corrections

LOG_RATIOS = st.lists(st.floats(-30, 30), min_size=1, max_size=12).map(np.array)


def test_weights_worked_by_hand():
    log_ratio_T = torch.tensor([0.1, 1.0, 4.0]).log()
    truncated = truncated_weights(log_ratio_T, low=0.5, high=2.0)
    torch.testing.assert_close(truncated.weight_T, torch.tensor([0.5, 1.0, 2.0]))
    assert truncated.changed_T.tolist() == [1.0, 0.0, 1.0]
    icepop = icepop_weights(log_ratio_T, low=0.5, high=2.0)
    torch.testing.assert_close(icepop.weight_T, torch.tensor([0.0, 1.0, 0.0]))
    assert icepop.changed_T.tolist() == [1.0, 0.0, 1.0]


@given(LOG_RATIOS)
def test_weights_equal_the_oracle(d):
    for fast, oracle in ((truncated_weights, corrections.truncated), (icepop_weights, corrections.icepop)):
        found = fast(torch.tensor(d), low=0.3, high=1.8)
        np.testing.assert_allclose(found.weight_T.numpy(), oracle(d, 0.3, 1.8), rtol=1e-12)


def test_weights_carry_no_gradient():
    log_ratio_T = torch.zeros(2, requires_grad=True)
    assert not truncated_weights(log_ratio_T, low=0.0, high=2.0).weight_T.requires_grad
    assert not icepop_weights(log_ratio_T, low=0.0, high=2.0).weight_T.requires_grad
