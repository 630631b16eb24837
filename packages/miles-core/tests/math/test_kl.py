import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from miles.core.math.kl import KL_KINDS, approx_kl
from miles.core.oracle import policy

LOGP = torch.tensor([-1.0, -0.5, -2.0, -30.0])
BASE = torch.tensor([-1.2, -0.5, -1.0, -1.0])
DIFFERENCES = st.lists(st.floats(-40, 40), min_size=1, max_size=20)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("k1", [0.2, 0.0, -1.0, -29.0]),
        ("k2", [0.02, 0.0, 0.5, 420.5]),
        ("k3", [0.018731, 0.0, 0.718282, math.exp(29) - 30]),
        ("low_var_kl", [0.018731, 0.0, 0.718282, 10.0]),
    ],
)
def test_estimates_worked_by_hand(kind, expected):
    torch.testing.assert_close(approx_kl(LOGP - BASE, kind), torch.tensor(expected), rtol=1e-5, atol=1e-6)


def test_importance_ratio_multiplies_before_the_clamp():
    ratio = torch.tensor([1.1, 0.9, 1.0, 2.0])
    expected = torch.tensor([0.020604, 0.0, 0.718282, 2 * (math.exp(29) - 30)])
    torch.testing.assert_close(approx_kl(LOGP - BASE, "k3", ratio), expected, rtol=1e-5, atol=1e-6)
    assert approx_kl(LOGP - BASE, "low_var_kl", ratio)[3] == 10.0


@given(DIFFERENCES)
def test_k3_is_never_negative(differences):
    assert (approx_kl(torch.tensor(differences, dtype=torch.float64), "k3") >= 0).all()


@settings(deadline=None)
@given(DIFFERENCES, st.sampled_from(KL_KINDS), st.booleans())
def test_estimates_equal_the_oracle(differences, kind, weighted):
    d = np.array(differences)
    ratio = np.linspace(0.5, 1.5, len(d)) if weighted else None
    found = approx_kl(torch.tensor(d), kind, None if ratio is None else torch.tensor(ratio))
    np.testing.assert_allclose(found.numpy(), policy.kl(d, np.zeros_like(d), kind, ratio), rtol=1e-9, atol=1e-12)


def test_expected_estimates_are_the_divergence():
    generator = torch.Generator().manual_seed(0)
    logits, base = torch.randn(2, 6, generator=generator, dtype=torch.float64)
    logp, base_logp = logits.log_softmax(0), base.log_softmax(0)
    divergence = (logp.exp() * (logp - base_logp)).sum()
    for kind in ("k1", "k3"):
        torch.testing.assert_close((logp.exp() * approx_kl(logp - base_logp, kind)).sum(), divergence)


def test_unbiased_estimate_has_the_gradient_of_the_divergence():
    """Tokens sampled from an older policy, weighted by the ratio: the expected gradient is that of KL(new || base)."""
    generator = torch.Generator().manual_seed(1)
    new, old, base = torch.randn(3, 6, generator=generator, dtype=torch.float64)
    new.requires_grad_()
    logp, old_logp, base_logp = new.log_softmax(0), old.log_softmax(0), base.log_softmax(0)
    divergence = (logp.exp() * (logp - base_logp)).sum()
    estimate = (old_logp.exp() * approx_kl(logp - base_logp, "k3", (logp - old_logp).exp())).sum()
    (found,), (expected,) = (torch.autograd.grad(x, [new], retain_graph=True) for x in (estimate, divergence))
    torch.testing.assert_close(found, expected)


def test_an_unknown_estimate_is_refused():
    with pytest.raises(ValueError, match="k4"):
        approx_kl(LOGP, "k4")
