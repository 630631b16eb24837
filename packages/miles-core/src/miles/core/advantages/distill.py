"""On-policy distillation (https://thinkingmachines.ai/blog/on-policy-distillation)."""

from __future__ import annotations

import torch

from miles.core.advantages.estimate import AdvantageInputs, AdvantageOptions, Advantages, required


def on_policy_distillation(inputs: AdvantageInputs, options: AdvantageOptions) -> Advantages:
    """Teacher's minus student's log-probability of each token: minus the sampled reverse KL.  Rewards are not used."""
    advantage_A = -sampled_reverse_kl(inputs)
    return Advantages(advantage_A, advantage_A)


def sampled_reverse_kl(inputs: AdvantageInputs) -> torch.Tensor:
    """Student's minus teacher's log-probability of each token; its mean over samples is the reverse KL divergence."""
    student_A = required(inputs.old_logp_A, "the policy's log-probabilities", "on_policy_distillation")
    teacher_A = required(inputs.teacher_logp_A, "the teacher's log-probabilities", "on_policy_distillation")
    return student_A - teacher_A
