import pytest
import torch

from miles.core.advantages.distill import on_policy_distillation
from miles.core.advantages.estimate import AdvantageInputs, AdvantageOptions
from miles.core.math.ragged import Ragged


def test_advantage_is_what_the_teacher_finds_more_likely():
    inputs = AdvantageInputs(
        Ragged([2]),
        torch.ones(2),
        torch.zeros(1),
        old_logp_A=torch.tensor([-2.0, -1.0]),
        teacher_logp_A=torch.tensor([-1.0, -3.0]),
    )
    assert on_policy_distillation(inputs, AdvantageOptions()).advantage_A.tolist() == [1.0, -2.0]


@pytest.mark.parametrize("missing", ["teacher", "policy"])
def test_both_log_probabilities_are_required(missing):
    columns = {"teacher_logp_A": torch.zeros(1), "old_logp_A": torch.zeros(1)}
    columns["teacher_logp_A" if missing == "teacher" else "old_logp_A"] = None
    with pytest.raises(ValueError, match=f"the {missing}'s log-probabilities"):
        on_policy_distillation(
            AdvantageInputs(Ragged([1]), torch.ones(1), torch.ones(1), **columns), AdvantageOptions()
        )
