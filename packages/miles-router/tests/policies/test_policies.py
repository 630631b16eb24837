"""Laws of the policies."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from miles.core.registry import Registry
from miles.router.policies.affinity import Sticky
from miles.router.policies.load import LeastLoaded, PowerOfTwo, RoundRobin, Weighted
from miles.router.policies.prefix import CacheAware, prefix_keys
from miles.router.settings import Settings

SETTINGS = Settings()
ALL = [LeastLoaded, RoundRobin, PowerOfTwo, Weighted, Sticky, CacheAware]


@dataclass
class FakeWorker:
    url: str
    in_flight: int = 0
    weight: float = 1.0


@dataclass
class FakeRequest:
    headers: dict[bytes, bytes] = field(default_factory=dict)
    body: bytes = b"{}"

    def header(self, name: bytes) -> bytes | None:
        return self.headers.get(name)

    def body_start(self) -> bytes:
        return self.body


def workers(*in_flight: int) -> list[FakeWorker]:
    return [FakeWorker(f"http://w{index}:1", load) for index, load in enumerate(in_flight)]


def of_session(name: str) -> FakeRequest:
    return FakeRequest({b"x-smg-routing-key": name.encode()})


def with_prompt(text: str) -> FakeRequest:
    return FakeRequest(body=b'{"sampling_params": {}, "text": "' + text.encode() + b'"}')


def test_every_policy_is_found_by_name():
    registry = Registry("miles.router_policies")
    found = {
        type(registry.get(name)(SETTINGS))
        for name in registry.names()
        if registry.find(name).distribution == "miles-router"
    }
    assert found == set(ALL)


@pytest.mark.parametrize("policy", ALL)
@given(loads=st.lists(st.integers(0, 50), min_size=1, max_size=8), key=st.binary(max_size=8))
def test_a_policy_chooses_one_of_the_workers(policy, loads, key):
    fleet = workers(*loads)
    assert policy(SETTINGS).choose(fleet, FakeRequest({b"x-smg-routing-key": key})) in fleet


@pytest.mark.parametrize("policy", ALL)
@pytest.mark.parametrize("held", [0, 7])
def test_no_worker_starves(policy, held):
    """With requests that end in the order they came, every worker gets some."""
    fleet, chooser, counts = workers(0, 0, 0, 0), policy(SETTINGS), Counter()
    open_requests: list[FakeWorker] = []
    for number in range(400):
        request = FakeRequest({b"x-smg-routing-key": b"%d" % number}, b'{"text": "%d' % number + b"x" * 600)
        worker = chooser.choose(fleet, request)
        counts[worker.url] += 1
        worker.in_flight += 1
        open_requests.append(worker)
        if len(open_requests) > held:
            open_requests.pop(0).in_flight -= 1
    assert len(counts) == 4
    assert min(counts.values()) >= 40


@given(st.lists(st.integers(0, 9), min_size=1, max_size=8))
def test_least_loaded_takes_the_least_loaded(loads):
    assert LeastLoaded(SETTINGS).choose(workers(*loads), FakeRequest()).in_flight == min(loads)


@given(st.lists(st.integers(0, 9), min_size=2, max_size=8))
def test_power_of_two_never_takes_the_most_loaded_one_alone(loads):
    chosen = PowerOfTwo(SETTINGS).choose(workers(*loads), FakeRequest())
    assert chosen.in_flight < max(loads) or sorted(loads)[-2] == max(loads)


def test_round_robin_goes_round():
    fleet, policy = workers(5, 0, 0), RoundRobin(SETTINGS)
    assert [policy.choose(fleet, FakeRequest()).url[7:9] for _ in range(6)] == ["w0", "w1", "w2"] * 2


@given(st.lists(st.integers(1, 5), min_size=2, max_size=5))
def test_weighted_fills_workers_in_proportion_to_their_weights(weights):
    fleet, policy = workers(*(0 for _ in weights)), Weighted(SETTINGS)
    for worker, weight in zip(fleet, weights):
        worker.weight = float(weight)
    for _ in range(sum(weights) * 10):
        policy.choose(fleet, FakeRequest()).in_flight += 1
    for worker, weight in zip(fleet, weights):
        assert abs(worker.in_flight - weight * 10) <= 1


def test_a_session_stays_with_its_worker_and_only_sessions_of_a_lost_worker_move():
    fleet, policy = workers(0, 0, 0, 0, 0), Sticky(SETTINGS)
    names = [f"session-{number}" for number in range(300)]
    home = {name: policy.choose(fleet, of_session(name)) for name in names}
    assert {name: policy.choose(fleet, of_session(name)) for name in names} == home
    assert Sticky(SETTINGS).choose(fleet, of_session("session-7")) is home["session-7"]
    smaller = fleet[1:]
    moved = [name for name in names if policy.choose(smaller, of_session(name)) is not home[name]]
    assert set(moved) == {name for name in names if home[name] is fleet[0]}
    assert min(Counter(worker.url for worker in home.values()).values()) > 20


@given(st.lists(st.integers(0, 30), min_size=1, max_size=8), st.text(max_size=5))
def test_sticky_never_exceeds_its_bound(loads, name):
    fleet = workers(*loads)
    chosen = Sticky(SETTINGS).choose(fleet, of_session(name))
    assert chosen.in_flight + 1 <= math.ceil(1.25 * (sum(loads) + 1) / len(loads))


def test_sticky_spreads_one_session_only_over_what_its_bound_asks_for():
    fleet, policy = workers(0, 0, 0, 0), Sticky(SETTINGS)
    for _ in range(100):
        policy.choose(fleet, of_session("hot")).in_flight += 1
    assert max(worker.in_flight for worker in fleet) <= math.ceil(1.25 * 100 / 4)


def test_requests_without_a_session_go_to_the_least_loaded_worker():
    assert Sticky(SETTINGS).choose(workers(3, 1, 2), FakeRequest()).in_flight == 1


def test_sticky_rings_are_forgotten_in_time():
    policy = Sticky(SETTINGS)
    for number in range(200):
        policy.choose([FakeWorker(f"http://w{number}:1")], of_session("a"))
    assert len(policy._rings) <= 64


def test_a_prompt_goes_where_its_longest_prefix_is():
    fleet, policy = workers(0, 0, 0), CacheAware(SETTINGS)
    system = "s" * 1000
    first = policy.choose(fleet, with_prompt(system + "a" * 1000))
    first.in_flight += 1
    assert policy.choose(fleet, with_prompt(system + "a" * 1000 + "b" * 1000)) is first
    assert policy.choose(fleet, with_prompt(system + "c" * 1000)) is first
    assert policy.choose(fleet, with_prompt("other" * 300)) is not first


def test_a_busy_worker_is_passed_over_for_all_its_prefixes():
    fleet, policy = workers(0, 0), CacheAware(Settings(balance_threshold=4))
    first = policy.choose(fleet, with_prompt("p" * 2000))
    first.in_flight = 5
    second = policy.choose(fleet, with_prompt("p" * 2000))
    assert second is not first
    first.in_flight = 0
    assert policy.choose(fleet, with_prompt("p" * 2000)) is second


def test_a_prefix_of_a_lost_worker_is_looked_for_elsewhere():
    fleet, policy = workers(0, 0), CacheAware(SETTINGS)
    first = policy.choose(fleet, with_prompt("q" * 2000))
    assert policy.choose([worker for worker in fleet if worker is not first], with_prompt("q" * 2000)) is not first


def test_prefixes_are_forgotten_in_time(monkeypatch):
    monkeypatch.setattr("miles.router.policies.prefix._MAX_ENTRIES", 100)
    policy = CacheAware(SETTINGS)
    for number in range(100):
        policy.choose(workers(0, 0), with_prompt(f"{number:04d}" * 200))
    assert len(policy._seen) == 100


@given(
    st.text(alphabet="ab", max_size=2000), st.text(alphabet="ab", max_size=2000), st.text(alphabet="ab", max_size=300)
)
def test_prompts_share_keys_exactly_as_far_as_they_share_blocks(common, one, other):
    keys = [prefix_keys(with_prompt(common + rest).body) for rest in (one, other)]
    shared = 0
    while shared < min(map(len, keys)) and keys[0][shared] == keys[1][shared]:
        shared += 1
    assert shared >= len(common.encode()) // 256
    assert keys[0][shared:] == [] or keys[1][shared:] == [] or keys[0][shared] != keys[1][shared]


def test_the_keys_of_a_prompt_are_bounded():
    assert len(prefix_keys(with_prompt("x" * 1_000_000).body)) == 256
    assert prefix_keys(b"not json") == []


async def test_real_requests_without_a_session_are_spread(make_worker, make_router):
    workers = [await make_worker(), await make_worker()]
    router = await make_router(*workers, policy="sticky")
    for _ in range(4):
        await router.post()
        await router.post("/generate", b"{}", "connection: keep-alive")
    assert [len(worker.requests) for worker in workers] == [4, 4]
