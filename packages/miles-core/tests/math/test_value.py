import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from miles.core.math.value import clipped_value_loss
from miles.core.oracle import policy


def test_losses_worked_by_hand():
    value, old, target = torch.tensor([1.0, 1.0, 0.1]), torch.tensor([0.0, 0.0, 0.0]), torch.tensor([1.0, 0.0, 1.0])
    result = clipped_value_loss(value, old, target, clip=0.2)
    torch.testing.assert_close(result.loss_T, torch.tensor([0.64, 1.0, 0.81]))
    assert result.clipped_T.tolist() == [1.0, 1.0, 0.0]


@settings(deadline=None)
@given(st.lists(st.tuples(*[st.floats(-3, 3)] * 3), min_size=1, max_size=20), st.floats(0, 1))
def test_losses_equal_the_oracle(tokens, clip):
    value, old, target = np.array(tokens).T.copy()
    found = clipped_value_loss(torch.tensor(value), torch.tensor(old), torch.tensor(target), clip=clip)
    loss, clipped = policy.value_loss(value, old, target, clip)
    np.testing.assert_allclose(found.loss_T.numpy(), loss, rtol=1e-12, atol=1e-12)
    np.testing.assert_array_equal(found.clipped_T.numpy(), clipped)
