"""Engines on the machine of the rollout side, as children of its process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from miles.core.flags.cluster import Cluster
from miles.core.ports import LOOPBACK, free_ports
from miles.core.protocols.engine import EngineLauncher, EnginePlace, EngineProcess, EngineSpec
from miles.core.registry import Registry
from miles.rollout.engine_options import engine_threads
from miles.rollout.flags import Engines

if TYPE_CHECKING:
    from miles.core.config import Config

ENGINES = Registry("miles.engines")


class ThisMachine:
    """See EngineHosts.  Accelerators are counted off after the trainer's, or are the trainer's."""

    def __init__(self, config: Config) -> None:
        cluster = config[Cluster]
        self._host = config[Engines].engine_host or LOOPBACK
        self._num_threads = engine_threads(config)
        self._first_gpu = 0 if cluster.colocate else cluster.actor_num_gpus_per_node
        self._gpus_per_engine = cluster.rollout_num_gpus_per_engine

    def places(self, indices: Sequence[int]) -> list[EnginePlace]:
        """See EngineHosts.  ConfigError when ``--engine-host`` is no address of this machine."""
        ports = free_ports(2 * len(indices), self._host)
        return [
            EnginePlace(
                self._host,
                port,
                bootstrap_port=bootstrap_port,
                first_gpu=self._first_gpu + index * self._gpus_per_engine,
                num_threads=self._num_threads,
            )
            for index, port, bootstrap_port in zip(indices, ports[::2], ports[1::2], strict=True)
        ]

    def launch(self, engine: str, spec: EngineSpec) -> EngineProcess:
        """See EngineHosts."""
        launcher: EngineLauncher = ENGINES.get(engine)()
        return launcher.launch(spec)
