import subprocess
import sys

import pytest

from miles.core.config import Config
from miles.core.training.objective_spec import Needs, ObjectiveSpec, required_inputs


def test_flags_and_spec_have_the_same_defaults():
    config = Config.of()
    spec = ObjectiveSpec.from_flags(config)
    assert spec == ObjectiveSpec(eps_clip_high=config.eps_clip_high)


@pytest.mark.parametrize(
    ("flags", "one_step", "expected"),
    [
        ({}, True, Needs(advantages=True)),
        ({}, False, Needs(advantages=True, old_logp=True)),
        ({"use_kl_loss": True}, True, Needs(advantages=True, ref_logp=True)),
        ({"entropy_coef": 0.1}, True, Needs(advantages=True, entropy=True)),
        ({"kl_coef": 0.1}, True, Needs(advantages=True)),
        (
            {"kl_coef": 0.1, "advantage_estimator": "reinforce_plus_plus"},
            True,
            Needs(advantages=True, old_logp=True, ref_logp=True),
        ),
        (
            {"kl_coef": 0.1, "advantage_estimator": "reinforce_plus_plus", "use_rollout_logprobs": True},
            False,
            Needs(advantages=True, ref_logp=True, rollout_logp=True),
        ),
        ({"advantage_estimator": "ppo"}, True, Needs(advantages=True, values=True)),
        (
            {"advantage_estimator": "on_policy_distillation"},
            True,
            Needs(advantages=True, old_logp=True, teacher_logp=True),
        ),
        ({"use_opd": True}, True, Needs(advantages=True, old_logp=True, teacher_logp=True)),
        (
            {"use_opd": True, "use_rollout_logprobs": True},
            True,
            Needs(advantages=True, rollout_logp=True, teacher_logp=True),
        ),
        ({"use_rollout_logprobs": True}, False, Needs(advantages=True, rollout_logp=True)),
        (
            {"use_rollout_logprobs": True, "get_mismatch_metrics": True},
            False,
            Needs(advantages=True, rollout_logp=True, old_logp=True),
        ),
        ({"use_tis": True}, True, Needs(advantages=True, rollout_logp=True)),
        (
            {"use_tis": True, "tis_batch_normalize": True},
            True,
            Needs(advantages=True, rollout_logp=True, old_logp=True),
        ),
        ({"loss_type": "sft_loss"}, False, Needs()),
        ({"compute_advantages_and_returns": False}, False, Needs(old_logp=True)),
    ],
)
def test_only_what_is_needed_is_computed(flags, one_step, expected):
    assert required_inputs(ObjectiveSpec(**flags), one_step=one_step) == expected


def test_the_critic_needs_values_and_shaped_rewards():
    spec = ObjectiveSpec(advantage_estimator="ppo", kl_coef=0.1)
    expected = Needs(advantages=True, values=True, old_logp=True, ref_logp=True)
    assert required_inputs(spec, role="critic") == expected


def test_the_spec_needs_no_torch():
    code = "import miles.core.training.objective_spec, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
