"""The router in front of the real SGLang."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from router_conformance import Engines, RouterConformance
from sglang_environment import python_with_sglang

from miles.core.ports import free_ports
from miles.core.protocols.engine import EngineSpec
from miles.rollout.engines.sglang.launcher import SGLangEngine

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

START_DEADLINE_S = 240.0


@pytest.fixture(scope="module")
def sglang_python() -> str:
    return python_with_sglang()


@pytest.fixture(scope="module")
def engines(toy, sglang_python, tmp_path_factory) -> Iterator[Engines]:
    logs = tmp_path_factory.mktemp("sglang")
    options = {"python": sglang_python, "max_total_tokens": 16384}
    running = [
        SGLangEngine().launch(
            EngineSpec(str(toy.checkpoint), "127.0.0.1", port, index, options=options, log_path=logs / f"{index}.log")
        )
        for index, port in enumerate(free_ports(2))
    ]
    try:
        for engine in running:
            engine.wait_ready(START_DEADLINE_S)
        yield Engines((running[0].url, running[1].url), toy.checkpoint)
    finally:
        for engine in running:
            engine.stop()


class TestSGLang(RouterConformance):
    """The same demands."""
