import signal

import pytest

from miles.core.driver.signals import ENDING, ending_signals_raise


@pytest.fixture(autouse=True)
def usual_handlers():
    """As a terminal starts programs: with nothing ignored."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in ENDING}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def get_twice(number: int, unwound: list[str]) -> None:
    """Be signalled, and once more on the way out."""
    with ending_signals_raise():
        try:
            signal.raise_signal(number)
        finally:
            signal.raise_signal(number)
            unwound.append("all of it")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_first_signal_unwinds_with_the_status_of_a_shell_and_the_second_does_not_disturb_that(number, capsys):
    unwound: list[str] = []
    with pytest.raises(SystemExit) as caught:
        get_twice(number, unwound)
    assert caught.value.code == 128 + number
    assert unwound == ["all of it"]
    assert capsys.readouterr().err == f"ended by {number.name}\n"


def test_what_nohup_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with ending_signals_raise():
            signal.raise_signal(signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
