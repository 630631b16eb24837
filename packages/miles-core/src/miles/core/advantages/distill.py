"""On-policy distillation (https://thinkingmachines.ai/blog/on-policy-distillation)."""

from __future__ import annotations

from miles.core.advantages.estimate import AdvantageInputs, AdvantageOptions, Advantages, required


def on_policy_distillation(inputs: AdvantageInputs, options: AdvantageOptions) -> Advantages:
    """Teacher's minus student's log-probability of each token: minus the sampled reverse KL.  Rewards are not used."""
    teacher_A = required(inputs.teacher_logp_A, "the teacher's log-probabilities", "on_policy_distillation")
    student_A = required(inputs.old_logp_A, "the policy's log-probabilities", "on_policy_distillation")
    advantage_A = teacher_A - student_A
    return Advantages(advantage_A, advantage_A)
