"""A rank that does what its flags say, around a backend that is told to be slow."""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
import time
import types
from concurrent.futures import ThreadPoolExecutor

import pytest

pytest.importorskip("torch")

import torch

from miles.core.config import Config
from miles.core.driver.local_executor import LocalRank
from miles.core.errors import EngineError
from miles.core.protocols.backend import Rank
from miles.core.weights.adapter_form import AdapterForm
from miles.core.weights.engine_client import EngineClient
from miles.core.weights.sync import SyncReport

OF_THE_ROLLOUT_PACKAGE = {"rollout_temperature": 1.0, "rollout_external": False}
DEADLINE_S = 60.0


class Backend:
    """Its actor takes as long as ``enough`` says, and is asked for log-probabilities now and then."""

    enough: threading.Event
    probed: int

    def defaults(self):
        return {}

    def create(self, config, rank, role):
        return self

    def train(self, batch):
        assert self.enough.wait(DEADLINE_S)

    def named_weights(self):
        return iter([("w", torch.zeros(2))])

    def adapter_form(self):
        return AdapterForm(1, 1.0, ("w",))

    def named_adapters(self):
        return iter([(name, torch.ones(2)) for name in self.adapter_form().names()])

    def log_probs(self, batch):
        type(self).probed += 1
        return batch.loss_masks


@pytest.fixture
def rank(tmp_path, monkeypatch):
    """``rank(flag=value, ...)``: a rank of that backend."""
    module = types.ModuleType("backend_of_a_test")
    module.Backend = Backend
    monkeypatch.setitem(sys.modules, module.__name__, module)
    Backend.enough, Backend.probed = threading.Event(), 0
    threads = torch.get_num_threads()

    def make(**flags):
        config = Config.of(train_backend="backend_of_a_test.Backend", **OF_THE_ROLLOUT_PACKAGE | flags)
        made = LocalRank(config, tmp_path, "actor")
        made.start()
        return made

    yield make
    torch.set_num_threads(threads)


def test_the_trainer_has_as_many_threads_as_it_is_given(rank):
    rank(train_num_threads=3)
    assert torch.get_num_threads() == 3
    rank(train_num_threads=1)
    assert torch.get_num_threads() == 1


@pytest.mark.parametrize(("timeout_s", "told"), [(0.02, True), (0.0, False)])
def test_a_rank_that_takes_long_is_told_on(rank, tmp_path, timeout_s, told):
    log = tmp_path / "logs" / "watchdog-actor-0.log"

    def end_when_told() -> None:
        until = time.monotonic() + (DEADLINE_S if told else 0.2)
        while time.monotonic() < until and not (log.exists() and "at train()" in log.read_text()):
            time.sleep(0.01)
        Backend.enough.set()

    threading.Thread(target=end_when_told).start()
    rank(watchdog_timeout_s=timeout_s).train(None)
    assert log.exists() is told
    if told:
        assert "rank 0 of the actor has been at train()" in log.read_text()


@pytest.mark.parametrize(("interval", "probes"), [(0, 0), (1, 5), (2, 3)])
def test_engines_are_probed_at_the_interval(rank, monkeypatch, interval, probes):
    made = rank(update_weight_probe_interval=interval)
    monkeypatch.setattr(made, "_send", lambda tensors, urls, version: SyncReport())
    for version in range(5):
        made.update_weights([], version)
    assert Backend.probed == probes


@pytest.mark.parametrize("wanted", [False, True])
def test_the_first_update_is_checked_where_that_is_wanted(rank, monkeypatch, wanted):
    made, done = rank(check_weight_update_equal=wanted, update_weight_probe_interval=0), []
    made._sender = types.SimpleNamespace(
        scramble=lambda: done.append("noise"), compare=lambda: done.append("compared"), close=lambda: None
    )
    monkeypatch.setattr(made, "_send", lambda tensors, urls, version: done.append("sent") or SyncReport())
    made.update_weights([], 0)
    made.update_weights([], 1)
    assert done == (["sent", "noise", "sent", "compared", "sent"] if wanted else ["sent", "sent"])


@pytest.mark.parametrize(
    ("serving", "facts", "sent"),
    [("auto", {"adapters": {"layers": ["w"]}}, True), ("auto", {}, False), ("merged", None, False)],
)
def test_adapters_go_to_engines_that_add_them_themselves(rank, monkeypatch, serving, facts, sent):
    made, got = rank(lora_rank=1, lora_serving=serving, update_weight_probe_interval=0), []
    made._sender = types.SimpleNamespace(
        send=lambda tensors, urls, version, adapter: got.append((dict(tensors).keys(), adapter)) or SyncReport(),
        close=lambda: None,
    )
    asked = []
    monkeypatch.setattr(EngineClient, "get", lambda client, path: asked.append(client.url) or facts)
    for version in range(2):
        made.update_weights(["http://one", "http://two"], version)
    form = made.actor.adapter_form()
    assert got == [(set(form.names()), form)] * 2 if sent else [({"w"}, None)] * 2
    assert asked == ([] if serving == "merged" else ["http://one", "http://two"])


def test_ranks_gather_the_same_tensor_after_an_engine_was_lost_in_an_update(rank):
    ranks, meeting, brought = [rank(), rank()], threading.Barrier(2, timeout=DEADLINE_S), [0, 0]

    def tensors(mine):
        for index in range(3):
            brought[mine] = index
            meeting.wait()
            assert brought[0] == brought[1]
            meeting.wait()
            yield str(index), torch.zeros(2)

    for index, made in enumerate(ranks):
        made.build(Rank(index, 2), 1)
        made.learner.named_weights = functools.partial(tensors, index)
    lost, got = ["after one tensor", "before the first"], []

    def send(named, urls, version, adapter):
        if lost:
            if lost.pop() == "after one tensor":
                next(named)
            raise EngineError("it does not answer")
        got.extend(name for name, _ in named)
        return SyncReport()

    ranks[0]._sender = types.SimpleNamespace(send=send, close=lambda: None)
    with contextlib.ExitStack() as stack:
        queues = [stack.enter_context(ThreadPoolExecutor(1)) for _ in ranks]  # as under Ray: one call after another
        for error in (EngineError, EngineError, type(None)):
            calls = [queue.submit(made.send_weights, [], 1, None) for queue, made in zip(queues, ranks, strict=True)]
            assert isinstance(calls[0].exception(DEADLINE_S), error)
        assert calls[1].exception(DEADLINE_S) is None
    assert got == ["0", "1", "2"]
