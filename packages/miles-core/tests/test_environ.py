from miles.core import environ


def test_waiting_threads_sleep_unless_the_user_says_otherwise(monkeypatch):
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    environ.prepare_process()
    assert environ.os.environ["OMP_WAIT_POLICY"] == "PASSIVE"
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    environ.prepare_process()
    assert environ.os.environ["OMP_WAIT_POLICY"] == "active"


def test_freed_memory_is_kept_by_this_process_and_its_children_unless_the_user_says_otherwise(monkeypatch):
    told = []
    monkeypatch.setattr(environ, "_mallopt", lambda option, value: told.append((option, value)))
    monkeypatch.delenv("MALLOC_MMAP_THRESHOLD_", raising=False)
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "1000")
    environ.prepare_process()
    assert told == [(-3, 2**25)]
    assert environ.os.environ["MALLOC_MMAP_THRESHOLD_"] == str(2**25)
    assert environ.os.environ["MALLOC_TRIM_THRESHOLD_"] == "1000"


def test_the_allocator_takes_its_options():
    environ._mallopt(-1, 2**26)
