import subprocess
import sys

import pytest

from miles.core.driver.lock import exclusive
from miles.core.errors import ConfigError

HOLD = """
import sys
from pathlib import Path
from miles.core.driver.lock import exclusive
with exclusive(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate(timeout=30)


def test_second_run_in_a_directory_is_refused_with_the_pid_of_the_first(tmp_path, holder):
    with pytest.raises(ConfigError, match=f"pid {holder.pid} on "), exclusive(tmp_path):
        pass


def test_killed_run_leaves_no_lock(tmp_path, holder):
    holder.kill()
    holder.wait(timeout=30)
    with exclusive(tmp_path):
        pass


def test_lock_is_given_back(tmp_path):
    for _ in range(2):
        with exclusive(tmp_path):
            pass
