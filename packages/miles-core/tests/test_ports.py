import pytest

from miles.core.errors import ConfigError
from miles.core.ports import free_ports


def test_ports_are_free_and_none_is_given_twice():
    ports = free_ports(20) + free_ports(20)
    assert len(set(ports)) == 40


def test_address_of_another_machine_is_refused():
    with pytest.raises(ConfigError, match=r"no server can listen at 203\.0\.113\.1: .* that of --engine-host"):
        free_ports(1, "203.0.113.1")
