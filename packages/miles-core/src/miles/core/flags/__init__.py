"""Flags that the core owns.  One file per subject; imports nothing heavy."""

from miles.core.config.group import Group
from miles.core.flags.algorithm import Algorithm
from miles.core.flags.checkpoint import Checkpoint
from miles.core.flags.cluster import Cluster
from miles.core.flags.data import Data
from miles.core.flags.debug import Debug
from miles.core.flags.hooks import Hooks
from miles.core.flags.logging import Logging
from miles.core.flags.lora import Lora
from miles.core.flags.optimizer import Optimizer
from miles.core.flags.reward import Reward
from miles.core.flags.system import System
from miles.core.flags.training import Training

GROUPS: tuple[type[Group], ...] = (
    Cluster,
    Training,
    Optimizer,
    Lora,
    Data,
    Checkpoint,
    Algorithm,
    Logging,
    Reward,
    Debug,
    Hooks,
    System,
)
