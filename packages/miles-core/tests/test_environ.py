from miles.core import environ


def test_waiting_threads_sleep_unless_the_user_says_otherwise(monkeypatch):
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    environ.prepare_process({})
    assert environ.os.environ["OMP_WAIT_POLICY"] == "PASSIVE"
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    environ.prepare_process({})
    assert environ.os.environ["OMP_WAIT_POLICY"] == "active"


def test_variables_of_the_trainer_are_set(monkeypatch):
    monkeypatch.setenv("SOME_ALLOCATOR", "old")
    environ.prepare_process({"SOME_ALLOCATOR": "new"})
    assert environ.os.environ["SOME_ALLOCATOR"] == "new"
