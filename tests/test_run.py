"""The launcher's entry point: what it says and answers when a signal ends it."""

import os
import signal

import pytest

from fedcmt import run


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_run_that_a_signal_ends_says_so_with_the_shell_s_code(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(number)
    monkeypatch.setattr(run, "_run_all", lambda options: os.kill(os.getpid(), number))
    assert run.main(["brats_sdl"]) == 128 + number
    said = capsys.readouterr().err
    assert said.startswith("\nstart_fl.sh: interrupted; everything it started has been ended; if a round was ")
    assert signal.getsignal(number) == before
