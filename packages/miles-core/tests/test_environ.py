from miles.core import environ


def test_waiting_threads_sleep_unless_the_user_says_otherwise(monkeypatch):
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    environ.prepare_process()
    assert environ.os.environ["OMP_WAIT_POLICY"] == "PASSIVE"
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    environ.prepare_process()
    assert environ.os.environ["OMP_WAIT_POLICY"] == "active"
