"""Advantages.  Arguments of the recursions are one sample's, an entry per response token."""

from __future__ import annotations

import numpy as np

from miles.core.oracle.distribution import Floats


def token_rewards(reward: float, kl: Floats, mask: Floats, kl_coef: float) -> Floats:
    """KL penalty at each token, the reward at the last trainable one."""
    rewards = -kl_coef * kl
    trained = np.flatnonzero(mask)
    if len(trained):
        rewards[trained[-1]] += reward
    return rewards


def discounted_returns(rewards: Floats, gamma: float) -> Floats:
    """``G_t = r_t + gamma G_{t+1}``."""
    returns = np.zeros_like(rewards)
    following = 0.0
    for t in reversed(range(len(rewards))):
        following = returns[t] = rewards[t] + gamma * following
    return returns


def gae(rewards: Floats, values: Floats, mask: Floats, gamma: float, lambd: float) -> tuple[Floats, Floats]:
    """Advantages and returns over the trainable tokens; 0 on the others."""
    advantages, returns = np.zeros_like(rewards), np.zeros_like(rewards)
    next_advantage = next_value = 0.0
    for t in reversed(np.flatnonzero(mask)):
        delta = rewards[t] + gamma * next_value - values[t]
        advantages[t] = delta + gamma * lambd * next_advantage
        returns[t] = advantages[t] + values[t]
        next_advantage, next_value = advantages[t], values[t]
    return advantages, returns


def whitened(advantages: list[Floats], masks: list[Floats]) -> list[Floats]:
    """Mean 0 and variance 1 over all trainable tokens."""
    trained = np.concatenate([a[m != 0] for a, m in zip(advantages, masks)])
    variance = trained.var(ddof=1) if len(trained) > 1 else 0.0
    return [(a - trained.mean()) / np.sqrt(variance + 1e-8) for a in advantages]


def group_rewards(rewards: list[float], groups: list[int], *, mean: bool, std: bool) -> list[float]:
    """Rewards relative to their group."""
    if not mean:
        return rewards
    relative = []
    for reward, group in zip(rewards, groups):
        members = np.array([r for r, g in zip(rewards, groups) if g == group])
        if (members == members[0]).all():
            relative.append(0.0)
        else:
            relative.append((reward - members.mean()) / (members.std(ddof=1) + 1e-6 if std else 1.0))
    return relative
