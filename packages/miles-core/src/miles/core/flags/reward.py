"""Rewards."""

from __future__ import annotations

from typing import Annotated

from miles.core.config.group import Flag, Group


class Reward(Group):
    title = "Reward Model Arguments"

    rm_type: Annotated[str | None, Flag(plugin="miles.rewards", composed=True)] = None
    """Reward function by name: ``math``, ``dapo``, ``f1``, ``random``, or that of an installed plugin. ``boxed_``
    before a name grades what the last box of the answer holds; ``math:1,format:0.1`` is a weighted sum.
    ``metadata["rm_type"]`` of a prompt wins over it."""

    rm_url: str | None = None
    """Address of the reward service of ``--rm-type remote_rm``."""

    reward_key: str | None = None
    """Entry of the reward to train on, when rewards are mappings."""

    eval_reward_key: Annotated[str | None, Flag(inherits="reward_key")] = None
    """The same for evaluation. Defaults to ``--reward-key``."""

    custom_rm_path: Annotated[str | None, Flag(path=True)] = None
    """Dotted path of a reward function ``(args, sample, **kwargs) -> float | dict``; with ``--group-rm`` it gets the
    list of a group's samples."""

    group_rm: bool = False
    """Score the samples of a prompt together."""

    custom_reward_post_process_path: Annotated[str | None, Flag(path=True)] = None
    """Dotted path of a function ``(args, samples) -> (raw_rewards, rewards)`` that replaces group normalization."""

    custom_convert_samples_to_train_data_path: Annotated[str | None, Flag(path=True)] = None
    """Dotted path of a function ``(args, samples) -> dict`` that replaces the conversion of samples to training
    data."""
