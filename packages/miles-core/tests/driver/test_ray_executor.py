import socket

import pytest

pytest.importorskip("ray")
pytest.importorskip("miles.rollout")

from miles.core.config import Config
from miles.core.driver.ray_executor import RayExecutor
from miles.core.errors import ConfigError


def test_address_at_which_nobody_listens_is_an_error_at_once():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
        with pytest.raises(ConfigError, match=f"--ray-address {address}: nobody answers there"):
            RayExecutor(Config.of(executor="ray", ray_address=address, debug_train_only=True, device="cpu"))


def test_a_cluster_that_somebody_else_has_started_on_this_machine_is_left_alone(monkeypatch):
    told = {}
    monkeypatch.setattr("ray.init", lambda **options: told.update(options))
    RayExecutor(Config.of(executor="ray", debug_train_only=True, device="cpu"))
    assert told["address"] == "local"
