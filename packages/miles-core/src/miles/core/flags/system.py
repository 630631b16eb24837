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

    use_distributed_post: Annotated[bool, Flag(unsupported="requests are sent by one process")] = False
    """Send HTTP requests from several processes."""

    padded_vocab_size: Annotated[
        PositiveInt | None, Flag(unsupported="it belongs to the megatron backend, which does not exist yet")
    ] = None
    """Size the vocabulary is padded to."""
