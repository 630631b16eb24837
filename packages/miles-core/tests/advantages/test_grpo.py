import torch

from miles.core.advantages.estimate import AdvantageInputs, AdvantageOptions
from miles.core.advantages.grpo import grpo
from miles.core.math.ragged import Ragged


def test_every_token_gets_the_reward_of_its_sample():
    inputs = AdvantageInputs(Ragged([2, 0, 1]), torch.ones(3), torch.tensor([1.0, 9.0, -1.0]))
    result = grpo(inputs, AdvantageOptions())
    assert result.advantage_A.tolist() == result.return_A.tolist() == [1.0, 1.0, -1.0]
