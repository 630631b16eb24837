"""One mixture-of-experts model, served by each engine of the protocol."""

from __future__ import annotations

import socket
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import pytest
import torch
import uvicorn
from transformers import AutoModelForCausalLM, PreTrainedModel

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "embedded"))

from engine_client import Client
from engine_models import save_model
from rollout_fakes import CHATML, save_tokenizer
from sglang_environment import python_with_sglang

from miles.core.ports import free_ports
from miles.core.protocols.engine import EngineSpec
from miles.rollout.engines.embedded.engine import Engine, EngineOptions
from miles.rollout.engines.embedded.server import Server
from miles.rollout.engines.sglang.launcher import SGLangEngine

START_S = 240.0


@dataclass(frozen=True)
class Served:
    """A running engine."""

    name: str
    url: str
    path: Path


@pytest.fixture(scope="session")
def conforming_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tokenizer(save_model("qwen3-moe-throughout", tmp_path_factory.mktemp("conforming")), CHATML)


@pytest.fixture
def reference(conforming_model: Path) -> PreTrainedModel:
    """The same model in transformers."""
    return AutoModelForCausalLM.from_pretrained(conforming_model, dtype=torch.float32).eval()


@contextmanager
def embedded(path: Path) -> Iterator[Served]:
    """In this process: what differs from a process of its own is tested with the launcher."""
    engine = Engine(EngineOptions(str(path), kv_bytes=1 << 26, keep_experts=True), lambda: None)
    listener = socket.create_server(("127.0.0.1", 0), backlog=512)
    server = uvicorn.Server(uvicorn.Config(Server(engine), log_level="warning", lifespan="off", ws="none"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    engine.runner.start()
    thread.start()
    yield Served("embedded", f"http://127.0.0.1:{listener.getsockname()[1]}", path)
    server.should_exit = True
    thread.join(10)
    engine.runner.stop()


@contextmanager
def sglang(path: Path, python: str) -> Iterator[Served]:
    (port,) = free_ports(1)
    options = {"python": python, "enable_return_routed_experts": True}
    spec = EngineSpec(str(path), "127.0.0.1", port, log_path=path / "sglang.log", options=options, takes_changes=True)
    engine = SGLangEngine().launch(spec)
    try:
        engine.wait_ready(START_S)
        yield Served("sglang", engine.url, path)
    finally:
        engine.stop()


@pytest.fixture(scope="session")
def sglang_python() -> str:
    return python_with_sglang()


@pytest.fixture(
    scope="session", params=["embedded", pytest.param("sglang", marks=[pytest.mark.e2e, pytest.mark.timeout(900)])]
)
def served(request: pytest.FixtureRequest, conforming_model: Path) -> Iterator[Served]:
    if request.param == "embedded":
        running = embedded(conforming_model)
    else:
        running = sglang(conforming_model, request.getfixturevalue("sglang_python"))
    with running as engine:
        yield engine


@pytest.fixture
async def client(served: Served) -> AsyncIterator[Client]:
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        yield Client(session, served.url)
