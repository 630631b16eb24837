import math

import torch

from miles.core.math.masked_importance import Tokens
from miles.core.math.mismatch import mismatch_statistics
from miles.core.math.ragged import Ragged


def statistics(train, rollout, mask):
    mask_T, layout = torch.tensor(mask), Ragged([len(mask)])
    return mismatch_statistics(torch.tensor(train), torch.tensor(rollout), Tokens(layout, mask_T, layout.sum(mask_T)))


def test_statistics_worked_by_hand():
    found = statistics([-1.0, -3.0, -50.0], [-1.0, -2.0, 0.0], [1.0, 1.0, 0.0])
    expected_tokens = {
        "kl": [0.0, 1.0, 0.0],
        "k3_kl": [0.0, math.exp(-1) - 1 + 1, 0.0],
        "chi2_token": [0.0, math.exp(-2) - 1, 0.0],
    }
    expected_samples = {
        "training_log_ppl": 2.0,
        "training_ppl": math.exp(2.0),
        "rollout_log_ppl": 1.5,
        "rollout_ppl": math.exp(1.5),
        "log_ppl_diff": 0.5,
        "log_ppl_abs_diff": 0.5,
        "ppl_ratio": math.exp(0.5),
        "chi2_seq": math.exp(-2) - 1,
    }
    torch.testing.assert_close(found.tokens, {name: torch.tensor(row) for name, row in expected_tokens.items()})
    torch.testing.assert_close(found.samples, {name: torch.tensor([x]) for name, x in expected_samples.items()})


def test_equal_distributions_do_not_differ():
    found = statistics([-1.0, -2.0], [-1.0, -2.0], [1.0, 1.0])
    assert all((row == 0).all() for row in found.tokens.values())
    assert found.samples["chi2_seq"].item() == found.samples["log_ppl_diff"].item() == 0.0
