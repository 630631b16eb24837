"""Files of settings, and what fits nowhere else."""

from __future__ import annotations

from typing import Annotated

from pydantic import PositiveInt

from miles.core.config.group import Flag, Group


class System(Group):
    title = "Miscellaneous and System"

    config: Annotated[str | None, Flag(source=True)] = None
    """YAML or TOML file of settings, by the names of the flags. The command line wins over it."""

    custom_config_path: str | None = None
    """YAML or TOML file of values for your own functions, which find them as ``args.<name>``."""

    http_proxy: str | None = None
    """HTTP proxy for calls of remote reward services."""

    use_distributed_post: bool = False
    """Send requests to the reward service (--rm-type remote_rm) from --rm-num-workers processes of their own (2 unless
    given), so that many large responses do not keep the rollout's event loop busy."""

    padded_vocab_size: PositiveInt | None = None
    """Size the vocabulary is padded to (megatron backend). Left out, ``--make-vocab-size-divisible-by`` sets it."""
