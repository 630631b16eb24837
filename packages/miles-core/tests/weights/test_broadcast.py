"""A real process group between this process and engines of their own."""

import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import torch

from miles.core.errors import EngineError, WeightSyncError
from miles.core.weights.broadcast import BroadcastTransport
from miles.core.weights.engine_client import EngineFleet
from miles.core.weights.sync import push_weights

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]

WEIGHTS = [("embed", torch.randn(10, 4)), ("head", torch.randn(4, 3).bfloat16()), ("bias", torch.randn(3))]


@contextmanager
def engines(*modes):
    program = Path(__file__).with_name("group_engine.py")
    with ExitStack() as stack:
        started = [
            stack.enter_context(
                subprocess.Popen([sys.executable, str(program), mode], stdout=subprocess.PIPE, text=True)
            )
            for mode in modes
        ]
        for process in started:
            stack.callback(process.kill)
        yield [f"http://127.0.0.1:{int(process.stdout.readline())}" for process in started]


def push(urls, transport, version):
    fleet = EngineFleet(urls, deadline_s=20)
    try:
        return push_weights(WEIGHTS, fleet, transport, version=version, bucket_bytes=100)
    finally:
        fleet.close()


def test_every_engine_gets_every_tensor_also_when_engines_change(tmp_path):
    with engines("obey", "obey", "obey") as urls:
        transport = BroadcastTransport(tmp_path)
        whole = sum(tensor.nbytes for _, tensor in WEIGHTS)
        assert push(urls[:2], transport, 1).bytes == whole
        assert push(urls[:2], transport, 2).bytes == whole
        assert push(urls[1:], transport, 3).bytes == whole
        transport.close()


@pytest.mark.parametrize("path", ["/init_weights_update_group", "/update_weights_from_distributed"])
def test_an_engine_that_refuses_does_not_hang_the_sender(tmp_path, path):
    with engines("obey", path) as urls:
        transport = BroadcastTransport(tmp_path)
        begin = time.monotonic()
        with pytest.raises(EngineError, match=f"{urls[1]}: POST {path} answered 400.*refused"):
            push(urls, transport, 1)
        transport.close()
        assert time.monotonic() - begin < 15


def test_an_engine_that_holds_something_else_is_named(tmp_path):
    with engines("corrupt") as urls:
        transport = BroadcastTransport(tmp_path)
        with pytest.raises(WeightSyncError, match="does not hold what was sent: embed"):
            push(urls, transport, 1)
        transport.close()
