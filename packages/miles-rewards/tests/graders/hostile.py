"""Functions that behave badly, for the pool to survive."""

import contextlib
import ctypes
import importlib
import os
import resource
import sys
import time
from pathlib import Path

import numpy as np

from miles.rewards.pool import Job, Pool


def echo(value):
    return value


def add(first, second):
    return first + second


def hang(value):
    while True:
        pass


def hang_if_negative(value):
    while value < 0:
        pass
    return value


def hang_in_c(value):
    return 7**10**9 % 2


def die(value):
    os._exit(3)


def die_if_negative(value):
    if value < 0:
        os._exit(3)
    return value


def segfault(value):
    return ctypes.string_at(0)


def eat_memory(value):
    return len(bytearray(8 << 30))


def recurse(value):
    return recurse(value)


def leave(value):
    sys.exit("out")


def fail(value):
    raise ValueError(f"no {value}")


class Speechless(Exception):
    def __str__(self):
        raise RuntimeError("no words either")


def fail_without_words(value):
    raise Speechless


def sleep(seconds):
    time.sleep(seconds)
    return seconds


def wait_for(path):
    while not Path(path).exists():
        time.sleep(0.01)
    return path


def cost_of(rm_type, response, label, metadata):
    """Seconds of computing that grading takes, and the most bytes that this process has had."""
    grade = importlib.import_module(f"miles.rewards.types.{rm_type}").grade
    started = time.process_time()
    grade(response, label, metadata)
    return time.process_time() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def pid(value):
    return os.getpid()


def numpy_number(value):
    return {"score": np.float32(0.5), "right": np.bool_(True)}


def an_object(value):
    return object()


def nested_list(value):
    nested = []
    for _ in range(100_000):
        nested = [nested]
    return nested


def huge_answer(value):
    return "x" * (70 << 20)


def scribble(value):
    for fd in range(3, 64):
        with contextlib.suppress(OSError):
            os.write(fd, b"\x00" * 7 + b"\x03[]]" + b"x" * 100)
    return value


def shout(value):
    sys.stdout.write("untrusted" * 1000 + "\n")
    sys.stderr.write("untrusted" * 1000 + "\n")
    return value


def write_file(path):
    Path(path).write_text("written")
    return True


not_a_function = 3


_COUNTS = {"calls": 0}


def the_same_mapping_changed(value):
    _COUNTS["calls"] = value
    return _COUNTS


def half_of_a_pair(value):
    return (float(value % 2), "odd" if value % 2 else "even")


def map_in_a_pool_of_its_own(answers):
    with Pool(1) as pool:
        answers.put([result.value for result in pool.map(Job("hostile:echo"), [(1,), (2,)])])


class Unreadable:
    """Pickles, but cannot be read back."""

    def __reduce__(self):
        return refuse, ()


def refuse():
    raise ValueError("unreadable")
