import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from miles.core.errors import EngineError
from miles.core.process import ChildProcess

SERVER = """
import http.server, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()
server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
open(sys.argv[1], "w").write(str(server.server_port))
server.serve_forever()
"""


def wait_until(condition, deadline_s=60.0):
    end = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end, "not within the deadline"
        time.sleep(0.01)


def exists(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_wait_ready_returns_when_the_server_answers(tmp_path):
    port_file = tmp_path / "port"
    child = ChildProcess([sys.executable, "-c", SERVER, str(port_file)], log_path=tmp_path / "log")
    try:
        wait_until(lambda: port_file.exists() and port_file.read_text())
        child.wait_ready(f"http://127.0.0.1:{port_file.read_text()}/health", 60)
        assert child.alive()
    finally:
        child.stop()
    assert not child.alive()
    assert child.returncode == -signal.SIGTERM


def test_a_child_that_dies_is_reported_with_the_end_of_its_own_log(tmp_path):
    log = tmp_path / "logs" / "engine.log"
    log.parent.mkdir()
    log.write_text("of an earlier run\n")
    child = ChildProcess(
        [sys.executable, "-c", "print('no such model'); raise SystemExit(3)"], log_path=log, name="engine 0"
    )
    words = r"engine 0 has ended with status 3 while starting\.[\s\S]*no such model"
    with pytest.raises(EngineError, match=words) as caught:
        child.wait_ready("http://127.0.0.1:9/health", 60)
    assert "earlier run" not in str(caught.value)
    child.stop()


def test_a_child_that_never_answers_is_reported_at_the_deadline(tmp_path):
    child = ChildProcess(
        [sys.executable, "-c", "import time; time.sleep(60)"], log_path=tmp_path / "log", name="router"
    )
    with pytest.raises(EngineError, match=r"router did not answer http://127\.0\.0\.1:9/health within 0 s"):
        child.wait_ready("http://127.0.0.1:9/health", 0.2)
    child.stop()


def test_the_environment_is_inherited_and_extended(tmp_path):
    code = "import os; print(os.environ['OMP_NUM_THREADS'], os.environ['SPACE'], 'PATH' in os.environ)"
    env = {"OMP_NUM_THREADS": "3", "SPACE": "a b=c"}
    child = ChildProcess([sys.executable, "-c", code], env=env, log_path=tmp_path / "log")
    wait_until(lambda: not child.alive())
    assert (tmp_path / "log").read_text() == "3 a b=c True\n"


def test_a_missing_program_is_named(tmp_path):
    child = ChildProcess(["/no/such/program"], log_path=tmp_path / "log")
    with pytest.raises(EngineError, match="cannot run /no/such/program"):
        child.wait_ready("http://127.0.0.1:9/", 60)


def test_a_child_that_ignores_terminate_is_killed_with_its_own_children(tmp_path):
    code = (
        "import signal, subprocess, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
        "p = subprocess.Popen([sys.executable, '-c', 'import signal, time;"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN); print(0, flush=True); time.sleep(60)'],"
        "stdout=subprocess.PIPE);"
        "p.stdout.readline(); print(p.pid, flush=True); time.sleep(60)"
    )
    log = tmp_path / "log"
    child = ChildProcess([sys.executable, "-c", code], log_path=log)
    wait_until(lambda: log.read_text().strip())
    grandchild = int(log.read_text())
    child.stop(deadline_s=0.1)
    assert child.returncode == -signal.SIGKILL
    wait_until(lambda: not exists(grandchild))


def test_the_end_of_a_killed_child_is_described(tmp_path):
    log = tmp_path / "engine-0.log"
    child = ChildProcess(
        [sys.executable, "-c", "import time; print('up', flush=True); time.sleep(60)"], log_path=log, name="engine 0"
    )
    wait_until(lambda: log.exists() and log.read_text() == "up\n")
    os.kill(child.pid, signal.SIGKILL)
    wait_until(lambda: not child.alive())
    assert child.describe_end() == f"engine 0 has ended with status -9 (SIGKILL). End of {log}:\nup"


def test_a_child_survives_the_thread_that_started_it(tmp_path):
    children = []
    code = "import time; print('up', flush=True); time.sleep(60)"
    thread = threading.Thread(
        target=lambda: children.append(ChildProcess([sys.executable, "-c", code], log_path=tmp_path / "log"))
    )
    thread.start()
    thread.join()
    wait_until(lambda: (tmp_path / "log").read_text() == "up\n")
    assert children[0].alive()
    children[0].stop()


def test_a_child_dies_with_its_killed_owner(tmp_path):
    owner_code = (
        "import sys, time; from pathlib import Path; from miles.core.process import ChildProcess;"
        "child = ChildProcess([sys.executable, '-c', 'import time; time.sleep(60)']);"
        "print(child.pid, flush=True); time.sleep(60)"
    )
    owner = subprocess.Popen([sys.executable, "-c", owner_code], stdout=subprocess.PIPE, text=True)
    pid = int(owner.stdout.readline())
    wait_until(lambda: exists(pid))
    os.kill(owner.pid, signal.SIGKILL)
    owner.wait()
    owner.stdout.close()
    wait_until(lambda: not exists(pid))
