"""A real process group between this process and engines of their own."""

import os
import signal
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


@pytest.fixture(scope="module")
def engines():
    """``with engines(mode, ...) as urls``."""
    program = Path(__file__).with_name("group_engine.py")
    with subprocess.Popen(
        [sys.executable, str(program)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    ) as parent:

        @contextmanager
        def start(*modes):
            with ExitStack() as stack:
                urls = []
                for mode in modes:
                    parent.stdin.write(f"{mode}\n")
                    pid, port = parent.stdout.readline().split()
                    stack.callback(os.kill, int(pid), signal.SIGKILL)
                    urls.append(f"http://127.0.0.1:{port}")
                yield urls

        yield start


def push(urls, transport, version):
    fleet = EngineFleet(urls, deadline_s=60)
    try:
        return push_weights(WEIGHTS, fleet, transport, version=version, bucket_bytes=100)
    finally:
        fleet.close()


def test_every_engine_gets_every_tensor_also_when_engines_change(engines, tmp_path):
    with engines("obey", "obey", "obey") as urls:
        transport = BroadcastTransport(tmp_path)
        whole = sum(tensor.nbytes for _, tensor in WEIGHTS)
        assert push(urls[:2], transport, 1).bytes == whole
        assert push(urls[:2], transport, 2).bytes == whole
        assert push(urls[1:], transport, 3).bytes == whole
        transport.close()


def test_an_engine_that_notes_the_group_late_gets_every_tensor(engines, tmp_path):
    with engines("late") as urls:
        transport = BroadcastTransport(tmp_path)
        assert push(urls, transport, 1).bytes == sum(tensor.nbytes for _, tensor in WEIGHTS)
        transport.close()


@pytest.mark.parametrize("path", ["/init_weights_update_group", "/update_weights_from_distributed"])
def test_an_engine_that_refuses_does_not_hang_the_sender(engines, tmp_path, path):
    with engines("obey", path) as urls:
        transport = BroadcastTransport(tmp_path)
        begin = time.monotonic()
        with pytest.raises(EngineError, match=f"{urls[1]}: POST {path} answered 400.*refused"):
            push(urls, transport, 1)
        transport.close()
        assert time.monotonic() - begin < 60


def test_an_engine_that_holds_something_else_is_named(engines, tmp_path):
    with engines("corrupt") as urls:
        transport = BroadcastTransport(tmp_path)
        with pytest.raises(WeightSyncError, match="does not hold what was sent: embed"):
            push(urls, transport, 1)
        transport.close()
