"""The router as a process: start, signals, reload, end."""

from __future__ import annotations

import asyncio
import json
import os
import resource
import signal
import socket
import ssl
import subprocess
import threading

import pytest
from scripted_worker import answers_after

from miles.core.errors import ConfigError
from miles.router import server as server_module
from miles.router.process import raise_file_limit
from miles.router.server import RouterServer, fast_path_fits, listen
from miles.router.settings import Settings


async def test_sigterm_finishes_what_is_in_flight_and_waiting_and_takes_no_more(make_worker, run, until):
    release = asyncio.Event()
    slow = answers_after(release, b"done")
    worker = await make_worker(slow)
    router = await run("--worker", worker.url, "--max-connections", "10")
    await router.ready(1)
    waiting = [asyncio.create_task(router.get("/x")) for _ in range(20)]
    await until(lambda: len(worker.requests) >= 10)
    router.process.send_signal(signal.SIGTERM)
    await until_refused(router.port)
    release.set()
    assert await asyncio.gather(*waiting) == [(200, b"done")] * 20
    assert await router.ended() == 0


async def until_refused(port):
    """Return when nobody listens on ``port``."""
    async with asyncio.timeout(20):
        while True:
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", port)
            except ConnectionError:
                return
            writer.close()
            await asyncio.sleep(0.02)


async def test_a_router_told_to_stop_answers_what_does_not_finish_in_time(make_worker, make_router, until):
    async def hang(talk):
        await talk.client_left()

    worker = await make_worker(hang)
    router = await make_router(worker, shutdown_timeout_s=1, header_timeout_s=0.4)
    waiting = asyncio.create_task(router.post())
    await until(lambda: worker.requests)
    router.server.stop()
    assert (await waiting).status == 503
    await router.task


@pytest.mark.slow
@pytest.mark.parametrize("path", ["auto", "off"])
async def test_what_does_not_finish_in_time_is_answered_at_the_end(make_worker, run, until, path):
    async def hang(talk):
        await talk.client_left()

    worker = await make_worker(hang)
    router = await run("--worker", worker.url, "--shutdown-timeout-s", "1", "--hot-path", path)
    await router.ready(1)
    waiting = asyncio.create_task(router.get("/x"))
    await until(lambda: worker.requests)
    router.process.send_signal(signal.SIGTERM)
    status, body = await waiting
    assert (status, b"shutting down" in body) == (503, True)
    assert await router.ended() == 0


async def test_sighup_reads_the_workers_again(make_worker, run, tmp_path):
    first, second = await make_worker(), await make_worker()
    path = tmp_path / "workers"
    path.write_text(f"# mine\n{first.url}=2\n\n")
    router = await run("--workers-file", str(path))
    await router.ready(1)
    path.write_text(f"{second.url}\n")
    router.process.send_signal(signal.SIGHUP)
    await router.answers("/list_workers", f'{{"urls":["{second.url}"]}}')
    path.write_text("nonsense\n")
    router.process.send_signal(signal.SIGHUP)
    await asyncio.sleep(0.1)
    assert (await router.get("/list_workers"))[1] == f'{{"urls":["{second.url}"]}}'.encode()


async def test_a_restarted_router_serves_again(make_worker, run):
    worker = await make_worker()
    router = await run("--worker", worker.url)
    await router.ready(1)
    router.process.kill()
    await router.ended()
    again = await run("--worker", worker.url)
    await again.ready(1)
    assert (await again.get("/x"))[0] == 200


@pytest.mark.parametrize("path", ["auto", "off"])
async def test_a_router_killed_under_load_is_replaced_and_every_client_knows_where_it_stands(make_worker, run, path):
    async def soon(talk):
        await asyncio.sleep(0.002)
        await talk.answer(talk.request.target.encode())

    workers = [await make_worker(soon) for _ in range(2)]
    flags = ["--hot-path", path, "--worker", *(worker.url for worker in workers)]
    router = await run(*flags)
    await router.ready(2)
    progress = []

    async def client(number):
        """Ask 40 times for something; ask again only after an error that shows."""
        errors = 0
        for question in range(40):
            while True:
                try:
                    status, body = await asyncio.wait_for(router.get(f"/{number}-{question}"), 20)
                except OSError:
                    errors += 1
                    await asyncio.sleep(0.02)
                    continue
                if status == 200:
                    assert body == f"/{number}-{question}".encode()
                    break
                assert status == 503
                await asyncio.sleep(0.02)
            progress.append(number)
        return errors

    clients = [asyncio.create_task(client(number)) for number in range(10)]
    while len(progress) < 100:  # noqa: ASYNC110
        await asyncio.sleep(0.001)
    router.process.kill()
    await router.ended()
    await run(*flags, port=router.port)
    assert sum(await asyncio.gather(*clients)) > 0
    assert len(progress) == 400
    status = json.loads((await router.get("/router/status"))[1])
    requests = status["requests"]
    assert requests["received"] == requests["answered"] + requests["refused"] + requests["cut"] + requests["cancelled"]
    assert status["in_flight"] == 0


@pytest.fixture
def certificate(tmp_path):
    """Certificate and key of localhost."""
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=localhost"]
    subprocess.run([*command, "-keyout", key, "-out", certificate], check=True, capture_output=True)
    return certificate, key


async def test_tls(make_worker, run, until, certificate):
    certificate, key = certificate
    worker = await make_worker()
    router = await run("--worker", worker.url, "--tls-certificate", str(certificate), "--tls-key", str(key))
    context = ssl.create_default_context(cafile=certificate)
    await until(lambda: worker.connections)
    reader, writer = await asyncio.open_connection("127.0.0.1", router.port, ssl=context, server_hostname="localhost")
    writer.write(b"GET /x HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
    assert (await reader.read()).startswith(b"HTTP/1.1 200")
    reader, writer = await asyncio.open_connection("127.0.0.1", router.port, ssl=context, server_hostname="localhost")
    writer.write(b"nonsense\r\n\r\n")
    assert (await reader.read()).startswith(b"HTTP/1.1 400")


def test_an_address_that_is_taken_is_named():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"--port {port}"):
            listen(Settings(port=port))


def test_what_cannot_work_is_refused_before_the_start(tmp_path):
    with pytest.raises(ConfigError, match="expected http"):
        RouterServer(Settings(worker=("nonsense",)))
    with pytest.raises(ConfigError, match="workers-file"):
        RouterServer(Settings(workers_file=tmp_path / "missing"))
    (tmp_path / "bad").write_text("http://a:1\nhttp://b:x\nhttp://c:1=y\n")
    with pytest.raises(ConfigError) as caught:
        RouterServer(Settings(workers_file=tmp_path / "bad"))
    assert [("line 2" in caught.value.problems[0]), ("line 3" in caught.value.problems[1])] == [True, True]
    with pytest.raises(ConfigError, match=r"--policy least_loadd: .*least_loaded"):
        RouterServer(Settings(policy="least_loadd"))
    with pytest.raises(ConfigError, match="control-token-file"):
        RouterServer(Settings(control_token_file=tmp_path / "missing"))
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(ConfigError, match="empty"):
        RouterServer(Settings(control_token_file=tmp_path / "empty"))


@pytest.mark.parametrize(("version", "fits"), [("0.33.9", False), ("0.34.0", True), ("0.54.1", True), ("1.0.0", False)])
def test_the_fast_path_is_used_only_with_tested_versions_of_uvicorn(version, fits):
    assert fast_path_fits(version) is fits


async def test_an_untested_uvicorn_serves_everything_through_asgi(make_worker, make_router, monkeypatch):
    monkeypatch.setattr(server_module, "_UVICORN_TESTED", ((0, 0), (0, 0)))
    worker = await make_worker()
    router = await make_router(worker)
    assert (await router.post("/x", b"body")).body == b"body"
    router.assert_settled()


async def test_the_failure_of_a_health_check_by_our_own_fault_ends_the_router(make_worker, make_router, monkeypatch):
    router = await make_router(await make_worker())

    def broken(worker, version):
        raise RuntimeError("check broke")

    monkeypatch.setattr(router.server.dispatcher.fleet, "probe_passed", broken)
    with pytest.raises(RuntimeError, match="check broke"):
        await router.task
    router.task = asyncio.create_task(asyncio.sleep(0))


async def test_a_workers_file_adds_and_drains(make_worker, make_router, tmp_path):
    first, second, own = await make_worker(), await make_worker(), await make_worker()
    path = tmp_path / "workers"
    path.write_text(f"{first.url}=2\n")
    router = await make_router(own, workers_file=path, ready=False)
    await router.state(first, "healthy")
    assert router.worker(first).weight == 2
    path.write_text(f"{second.url}\n")
    router.server.membership.read_file(path, 5.0)
    await router.until(lambda: router.worker(first) is None)
    await router.state(second, "healthy")
    await router.state(own, "healthy")
    path.write_text("nonsense\n")
    router.server._reload()
    assert len(router.server.dispatcher.fleet) == 2


async def test_a_reload_without_a_file_changes_nothing(make_worker, make_router, caplog):
    router = await make_router(await make_worker())
    router.server._reload()
    assert "no --workers-file" in caplog.text
    assert len(router.server.dispatcher.fleet) == 1


async def test_the_failure_of_a_background_task_ends_the_router(make_worker, make_router, monkeypatch):
    router = await make_router(await make_worker(), stall_timeout_s=0.1)

    def broken():
        raise RuntimeError("sweep broke")

    monkeypatch.setattr(router.server.dispatcher, "sweep", broken)
    with pytest.raises(RuntimeError, match="sweep broke"):
        await router.task
    router.task = asyncio.create_task(asyncio.sleep(0))


def test_the_limit_of_open_files_is_raised():
    raise_file_limit()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert soft == hard


async def test_no_file_descriptor_is_left_behind(make_worker, make_router):
    worker = await make_worker()
    router = await make_router(worker, worker_idle_timeout_s=0.1, header_timeout_s=0.4)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        client = await router.connect()
        await client.post()
        client.close()
    await router.until(lambda: len(os.listdir("/proc/self/fd")) <= before + 1)


async def test_a_router_in_another_thread_leaves_signals_alone(make_worker, until):
    server = RouterServer(Settings(worker=((await make_worker()).url,)))
    listener = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(listener)))
    before = signal.getsignal(signal.SIGTERM)
    thread.start()
    try:
        reader, writer = await asyncio.open_connection(*listener.getsockname())
        writer.write(b"GET /liveness HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        assert (await reader.read()).startswith(b"HTTP/1.1 200")
        writer.close()
        assert signal.getsignal(signal.SIGTERM) is before
    finally:
        server.stop()
        await asyncio.to_thread(thread.join, 20)
        listener.close()
    assert not thread.is_alive()


async def test_a_removal_under_way_ends_with_the_router(make_worker, make_router, until):
    async def hang(talk):
        await talk.client_left()

    worker = await make_worker(hang)
    router = await make_router(worker)
    waiting = asyncio.create_task(router.post())
    await until(lambda: worker.requests)
    removal = router.server.membership.remove(router.worker(worker), 60.0)
    await until(lambda: router.worker(worker).draining)
    router.server.membership.stop()
    await asyncio.wait([removal], timeout=20)
    assert removal.cancelled()
    waiting.cancel()


async def test_an_abort_under_way_ends_with_the_router(make_worker, make_router, until):
    worker = await make_worker()
    router = await make_router(worker, health_check_interval_s=60)
    worker.hangs = True
    dispatcher = router.server.dispatcher
    await worker.stop_listening()
    dispatcher.abort_request(router.worker(worker), "mine")
    (task,) = dispatcher._tasks
    dispatcher.stop()
    await asyncio.wait([task], timeout=20)
    assert task.cancelled()
