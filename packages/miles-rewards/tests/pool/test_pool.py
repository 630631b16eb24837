import asyncio
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import hostile
import pytest

from miles.core.errors import RewardError
from miles.rewards.pool import OPEN_LIMITS, Job, Limits, Pool, Result
from miles.rewards.pool.backlog import Backlog

ECHO = Job("hostile:echo")


@pytest.fixture(scope="module")
def shared_pool():
    with Pool(2, timeout_s=60.0) as pool:
        yield pool


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_results_come_back_in_order(shared_pool):
    results = shared_pool.map(ECHO, [(i,) for i in range(1000)])
    assert [result.value for result in results] == list(range(1000))
    assert {result.status for result in results} == {"ok"}


def test_no_items_give_no_results(shared_pool):
    assert list(shared_pool.map(ECHO, [])) == []


async def test_calls_from_an_event_loop(shared_pool):
    results = await asyncio.gather(*(shared_pool.run(ECHO, i) for i in range(300)))
    assert [result.value for result in results] == list(range(300))


async def test_many_calls_from_an_event_loop_at_once(shared_pool):
    items = [(i,) if i != 7 else (lambda: 0,) for i in range(3000)]
    results = await shared_pool.run_many(ECHO, items)
    assert [result.value for result in results] == [i if i != 7 else None for i in range(3000)]
    assert "cannot be sent" in results[7].detail
    assert list(await shared_pool.run_many(ECHO, [])) == []


async def test_cancelled_calls_give_their_places_back_together():
    async with Pool(1, timeout_s=5.0) as pool:
        waiting = asyncio.ensure_future(pool.run_many(Job("hostile:sleep"), [(0.3,)] * 200))
        await asyncio.sleep(0.1)
        waiting.cancel()
        started = time.perf_counter()
        assert (await pool.run(ECHO, 1)).value == 1
        assert time.perf_counter() - started < 50  # of the 60 s that all would take


def test_a_mapping_that_a_function_returns_again_changed_is_taken_as_it_was(shared_pool):
    results = shared_pool.map(Job("hostile:the_same_mapping_changed"), [(i,) for i in range(20)])
    assert [result.value for result in results] == [{"calls": i} for i in range(20)]


def test_constants_that_many_calls_return_keep_their_places(shared_pool):
    results = shared_pool.map(Job("hostile:half_of_a_pair"), [(i,) for i in range(3000)])
    assert [tuple(result.value) for result in results] == [(i % 2, "odd" if i % 2 else "even") for i in range(3000)]


def test_a_hang_among_thousands_of_short_calls_costs_one():
    with Pool(2, timeout_s=0.5) as pool:
        job = Job("hostile:hang_if_negative")
        pool.map(job, [(i,) for i in range(3000)])
        values = [-1 if i == 1500 else i for i in range(3000)]
        results = pool.map(job, [(value,) for value in values])
    assert [i for i, result in enumerate(results) if result.status != "ok"] == [1500]
    assert results[1500].status == "timeout"


def test_bound_arguments_come_first(shared_pool):
    assert shared_pool.map(Job("hostile:add", bound=("left",)), [("right",)])[0].value == "leftright"


@pytest.mark.parametrize("function", ["hang", "hang_in_c"])
def test_a_hung_call_times_out_and_costs_only_itself(shared_pool, function):
    hung = Job(f"hostile:{function}", timeout_s=0.3)

    async def both() -> list[Result]:
        return await asyncio.gather(shared_pool.run(hung, 1), *(shared_pool.run(ECHO, i) for i in range(50)))

    first, *others = asyncio.run(both())
    assert first.status == "timeout"
    assert "0.3 s" in first.detail
    assert [other.value for other in others] == list(range(50))


@pytest.mark.parametrize("function", ["die", "segfault", "scribble"])
def test_a_call_that_kills_its_worker_is_a_crash(shared_pool, function):
    assert shared_pool.map(Job(f"hostile:{function}"), [(1,)])[0].status == "crash"
    assert shared_pool.map(ECHO, [(1,)])[0].value == 1


def test_neighbours_in_a_batch_survive_hangs_and_deaths(shared_pool):
    values = [-1 if i % 40 == 7 else i for i in range(200)]
    # The deadline of those that die is no part of this, and a busy machine takes its time to bury them.
    for function, status, timeout_s in (("hang_if_negative", "timeout", 0.5), ("die_if_negative", "crash", 30.0)):
        results = shared_pool.map(Job(f"hostile:{function}", timeout_s=timeout_s), [(value,) for value in values])
        assert [result.status for result in results] == [status if value < 0 else "ok" for value in values]
        assert all(result.value == value for result, value in zip(results, values) if value >= 0)


def test_arguments_that_cannot_be_read_cost_their_own_call(shared_pool):
    items = [(hostile.Unreadable(),) if place == 40 else (place,) for place in range(100)]
    results = shared_pool.map(Job("hostile:echo"), items)
    assert [place for place, result in enumerate(results) if result.status != "ok"] == [40]
    assert results[40].detail == "ValueError: unreadable"
    assert [result.value for result in results[41:]] == list(range(41, 100))


def test_memory_is_bounded(shared_pool):
    result = shared_pool.map(Job("hostile:eat_memory"), [(1,)])[0]
    assert (result.status, result.detail) == ("error", "MemoryError")


@pytest.mark.parametrize(
    ("function", "detail"),
    [
        ("fail", "ValueError: no 1"),
        ("leave", "SystemExit: out"),
        ("recurse", "RecursionError"),
        ("an_object", "not plain data"),
        ("nested_list", "not plain data"),
        ("missing", "AttributeError"),
        ("not_a_function", "not a function"),
        ("fail_without_words", "Speechless"),
    ],
)
def test_errors_are_results_that_say_why(shared_pool, function, detail):
    result = shared_pool.map(Job(f"hostile:{function}"), [(1,)])[0]
    assert result.status == "error"
    assert detail in result.detail
    assert "\n" not in result.detail


def test_a_module_that_does_not_exist_is_an_error(shared_pool):
    assert "No module named 'no_such_module'" in shared_pool.map(Job("no_such_module:f"), [(1,)])[0].detail


def test_arguments_that_cannot_be_sent_are_an_error(shared_pool):
    first, second = shared_pool.map(ECHO, [(lambda: 0,), (2,)])
    assert first.status == "error"
    assert "cannot be sent" in first.detail
    assert second.value == 2


def test_numpy_numbers_come_back_as_plain_ones(shared_pool):
    assert shared_pool.map(Job("hostile:numpy_number"), [(1,)])[0].value == {"score": 0.5, "right": True}


def test_unpaired_surrogates_and_control_characters_travel(shared_pool):
    text = "\ud800 \x00 \u202e ok"
    assert shared_pool.map(ECHO, [(text,)])[0].value == text


def test_large_arguments_travel(shared_pool):
    results = shared_pool.map(ECHO, [("x" * 3_000_000,)] * 4)
    assert [len(result.value) for result in results] == [3_000_000] * 4


def test_an_answer_beyond_all_bounds_is_an_error(shared_pool):
    assert "returned 73400" in shared_pool.map(Job("hostile:huge_answer", timeout_s=20), [(1,)])[0].detail
    assert shared_pool.map(ECHO, [(1,)])[0].value == 1


def test_workers_neither_print_nor_write(shared_pool, tmp_path, capfd):
    assert shared_pool.map(Job("hostile:shout"), [(1,)])[0].value == 1
    assert shared_pool.map(Job("hostile:write_file"), [(str(tmp_path / "file"),)])[0].status == "error"
    assert capfd.readouterr() == ("", "")


def test_open_limits_let_users_functions_print_and_write(tmp_path, capfd):
    with Pool(1, limits=OPEN_LIMITS) as pool:
        pool.map(Job("hostile:shout"), [(1,)])
        assert pool.map(Job("hostile:write_file"), [(str(tmp_path / "file"),)])[0].value is True
    assert "untrusted" in capfd.readouterr().out


async def test_a_slow_call_does_not_hold_up_its_neighbours(shared_pool, tmp_path):
    go = tmp_path / "go"
    slow = asyncio.ensure_future(shared_pool.run(Job("hostile:wait_for"), str(go)))
    results = await asyncio.gather(*(shared_pool.run(ECHO, i) for i in range(40)))
    assert [result.value for result in results] == list(range(40))
    assert not slow.done()
    go.touch()
    assert (await slow).value == str(go)


async def test_workers_whose_calls_were_taken_back_go_on(shared_pool):
    for _ in range(3):
        slow = [asyncio.ensure_future(shared_pool.run(Job("hostile:sleep", timeout_s=9), 0.15)) for _ in range(2)]
        results = await asyncio.gather(*(shared_pool.run(ECHO, i) for i in range(60)))
        assert [result.value for result in results] == list(range(60))
        await asyncio.gather(*slow)


async def test_the_deadline_does_not_run_while_a_call_waits(tmp_path):
    go = tmp_path / "go"
    async with Pool(1, timeout_s=60.0) as pool:
        first = asyncio.ensure_future(pool.run(Job("hostile:wait_for"), str(go)))
        await asyncio.sleep(0)
        second = asyncio.ensure_future(pool.run(Job("hostile:echo", timeout_s=1.0), 2))
        await asyncio.sleep(1.1)
        go.touch()
        assert [(await first).status, (await second).status] == ["ok", "ok"]


async def test_a_cancelled_call_gives_its_place_back():
    async with Pool(1, timeout_s=5.0) as pool:
        first = asyncio.ensure_future(pool.run(Job("hostile:sleep"), 0.3))
        await asyncio.sleep(0.05)
        waiting = [asyncio.ensure_future(pool.run(Job("hostile:sleep"), 5.0)) for _ in range(3)]
        await asyncio.sleep(0)
        for task in waiting:
            task.cancel()
        assert (await pool.run(ECHO, 1)).value == 1
        assert (await first).value == 0.3


def test_deadlines_hold_while_the_event_loop_is_stuck():
    async def stuck() -> str:
        with Pool(1, timeout_s=0.2) as pool:
            pool.start()
            task = asyncio.ensure_future(pool.run(Job("hostile:hang"), 1))
            await asyncio.sleep(0)
            while pool.num_replaced == 0:
                time.sleep(0.01)  # noqa: ASYNC251 (the point of the test)
            return (await task).status

    assert asyncio.run(stuck()) == "timeout"


def test_calls_from_many_threads(shared_pool):
    totals = []

    def work(base: int) -> None:
        totals.append(sum(result.value for result in shared_pool.map(ECHO, [(base + i,) for i in range(100)])))

    threads = [threading.Thread(target=work, args=(1000 * n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(totals) == [100_000 * n + 4950 for n in range(8)]


def test_close_ends_every_process():
    pool = Pool(3, timeout_s=30)
    pool.start()
    pids = pool.pids
    assert len(pids) == 4
    thread = threading.Thread(target=pool.map, args=(Job("hostile:hang"), [(1,)]))
    thread.start()
    pool.close()
    thread.join(60)
    assert not thread.is_alive()
    assert not any(alive(pid) for pid in pids)


def test_a_closed_pool_starts_again_at_the_next_call():
    pool = Pool(1)
    assert pool.map(ECHO, [(1,)])[0].value == 1
    pool.close()
    pool.close()
    assert pool.map(ECHO, [(2,)])[0].value == 2
    pool.close()


def test_calls_waiting_at_close_come_back_as_errors():
    pool = Pool(1, timeout_s=30)
    results = []
    thread = threading.Thread(target=lambda: results.extend(pool.map(Job("hostile:sleep"), [(20,)] * 3)))
    thread.start()
    pool.start()
    pool.close()
    thread.join(60)
    assert [result.status for result in results] == ["error"] * 3
    assert "closed" in results[0].detail


def test_nobody_waits_for_ever_when_the_pool_itself_breaks(monkeypatch):
    take = Backlog.take

    def take_and_break(backlog, share):
        take(backlog, share)
        raise MemoryError("no room")

    with Pool(1) as pool:
        pool.start()
        monkeypatch.setattr(Backlog, "take", take_and_break)
        results = []
        thread = threading.Thread(target=lambda: results.extend(pool.map(ECHO, [(1,), (2,)])), daemon=True)
        thread.start()
        thread.join(60)
    assert [result.status for result in results] == ["error"] * 2
    assert "MemoryError: no room" in results[0].detail


def test_the_pool_survives_the_death_of_the_workers_parent():
    with Pool(2) as pool:
        pool.start()
        workers_parent = pool.pids[-1]
        os.kill(workers_parent, signal.SIGKILL)
        assert [result.value for result in pool.map(ECHO, [(i,) for i in range(100)])] == list(range(100))
        assert workers_parent not in pool.pids


def test_a_preload_that_fails_is_named_at_the_start():
    with Pool(1, preload=["no_such_module"]) as pool, pytest.raises(RewardError, match="no_such_module"):
        pool.start()


def test_calls_on_a_pool_that_cannot_start_come_back_as_errors():
    with Pool(1, preload=["no_such_module"]) as pool:
        result = pool.map(ECHO, [(1,)])[0]
    assert result.status == "error"
    assert "no_such_module" in result.detail


@pytest.mark.parametrize("arguments", [{"num_workers": 0}, {"timeout_s": 0.0}])
def test_impossible_settings_are_refused(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        Pool(**arguments)


def test_a_limit_of_memory_is_per_worker():
    with Pool(1, limits=Limits(memory_bytes=None)) as pool:
        assert pool.map(Job("hostile:echo"), [("fine",)])[0].value == "fine"


SCRIPT = """
import os, sys
sys.path.insert(0, {graders!r})
from miles.rewards.pool import Job, Pool
print("once")
pool = Pool(1)
print(pool.map(Job("hostile:echo"), [(1,)])[0].value)
{rest}
"""


def run_script(rest: str) -> subprocess.CompletedProcess[str]:
    graders = str(Path(__file__).parents[1] / "graders")
    program = SCRIPT.format(graders=graders, rest=rest)
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)


def test_a_script_without_main_guard_runs_once_and_leaves_nothing_behind():
    finished = run_script("print(*pool.pids)")
    assert finished.stderr == ""
    once, value, pids = finished.stdout.splitlines()
    assert (once, value) == ("once", "1")
    assert not any(alive(int(pid)) for pid in pids.split())


def test_workers_die_with_a_killed_parent():
    finished = run_script("print(*pool.pids, flush=True); os.kill(os.getpid(), 9)")
    pids = [int(pid) for pid in finished.stdout.splitlines()[2].split()]
    deadline = time.monotonic() + 60
    while any(alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(alive(pid) for pid in pids)


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_daemonic_processes_of_other_libraries_can_have_pools(method):
    context = multiprocessing.get_context(method)
    answers = context.Queue()
    process = context.Process(target=hostile.map_in_a_pool_of_its_own, args=(answers,), daemon=True)
    process.start()
    assert answers.get(timeout=120) == [1, 2]
    process.join(60)
    assert process.exitcode == 0


def test_a_forked_process_gets_workers_of_its_own():
    finished = run_script(
        "pid = os.fork()\n"
        "print(pool.map(Job('hostile:echo'), [(2,)])[0].value, flush=True)\n"
        "os.waitpid(pid, 0) if pid else None\n"
    )
    assert finished.stdout.split() == ["once", "1", "2", "2"]
    assert finished.stderr == ""
