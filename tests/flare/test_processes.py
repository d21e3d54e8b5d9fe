"""FLARE's processes: whatever was started for a workspace is ended."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fedcmt.flare import processes
from fedcmt.flare.processes import (
    Ended,
    descendants,
    end_processes,
    end_workspace,
    ending_on_signals,
    undisturbed,
)
from fedcmt.workspace import WORKSPACE_VARIABLE, child_environment
from tests.flare.running import is_running

PARENT = """
import subprocess, sys, time
command = [sys.executable, "-c", *sys.argv[1:]]
child = subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True)
child.stdout.readline()
print(child.pid, flush=True)
time.sleep(60)
"""
STUBBORN = """
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("ready", flush=True)
time.sleep(60)
"""
POLITE = """
import pathlib, signal, sys, time
def leave(number, frame):
    pathlib.Path(sys.argv[1]).write_text("cleaned up")
    sys.exit()
signal.signal(signal.SIGTERM, leave)
print("ready", flush=True)
time.sleep(60)
"""


@contextmanager
def family(grandchild: str, *arguments: str) -> Iterator[tuple[subprocess.Popen, int]]:
    """A process with a child in a session of its own, both asleep; ended afterwards in any case."""
    command = [sys.executable, "-c", PARENT, grandchild, *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as root:
        assert root.stdout is not None
        pid = int(root.stdout.readline())
        try:
            yield root, pid
        finally:
            root.kill()
            if is_running(pid):
                os.kill(pid, signal.SIGKILL)


def test_descendants_in_sessions_of_their_own_are_ended_politely(tmp_path: Path) -> None:
    with family(POLITE, str(tmp_path / "note")) as (root, pid):
        assert os.getsid(pid) != os.getsid(root.pid)
        end_processes(descendants(root.pid))
        assert not is_running(pid)
        assert not is_running(root.pid)
        assert (tmp_path / "note").read_text() == "cleaned up"


def test_descendants_that_ignore_sigterm_are_killed_after_the_grace_period(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "_GRACE_SECONDS", 0.5)
    with family(STUBBORN) as (root, pid):
        started = time.monotonic()
        end_processes(descendants(root.pid))
        assert time.monotonic() - started >= 0.5
        assert not is_running(pid)
        assert not is_running(root.pid)


def test_ending_a_process_that_is_gone_is_no_error() -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    end_processes(descendants(process.pid))
    assert not is_running(process.pid)


RESTARTED = """
import os, signal, subprocess, sys
def go_on(number, frame):
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    os._exit(0)
signal.signal(signal.SIGTERM, go_on)
print("ready", flush=True)
signal.pause()
"""


def test_a_process_that_starts_another_when_it_is_ended_leaves_none(tmp_path: Path) -> None:
    environment = {**os.environ, WORKSPACE_VARIABLE: str(tmp_path)}
    command = [sys.executable, "-c", RESTARTED]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        end_workspace(str(tmp_path))
        assert processes.processes_of(str(tmp_path)) == []


def test_processes_of_another_workspace_are_left_alone(tmp_path: Path) -> None:
    environment = {**os.environ, WORKSPACE_VARIABLE: str(tmp_path / "other")}
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], env=environment) as process:
        end_workspace(str(tmp_path))
        end_workspace(None)
        assert is_running(process.pid)
        process.kill()


def test_signals_end_in_an_exit_and_handlers_come_back() -> None:
    before = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGHUP)]
    with pytest.raises(Ended) as raised, ending_on_signals():
        os.kill(os.getpid(), signal.SIGTERM)
    assert raised.value.code == 128 + signal.SIGTERM
    assert [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGHUP)] == before


def test_a_forked_process_ends_by_the_signal_as_it_would_have(tmp_path: Path) -> None:
    note = tmp_path / "note"
    code = f"""
import os, pathlib, signal
from fedcmt.flare.processes import ending_on_signals
with ending_on_signals():
    child = os.fork()
    if child == 0:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            signal.pause()
        finally:
            pathlib.Path({str(note)!r}).touch()
    _, status = os.waitpid(child, 0)
    print(os.WTERMSIG(status), flush=True)
"""
    environment = child_environment(Path(processes.__file__).parents[2], {})
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert int(done.stdout) == signal.SIGTERM
    assert not note.exists()


def test_signals_are_ignored_while_nothing_may_disturb_and_handlers_come_back() -> None:
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    with undisturbed():
        for number in numbers:
            os.kill(os.getpid(), number)
    assert [signal.getsignal(number) for number in numbers] == before


def test_children_import_the_package_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", f"/other{os.pathsep}/src")
    environment = child_environment(Path("/src"), {"EXTRA": "1"})
    assert environment["PYTHONPATH"] == f"/src{os.pathsep}/other"
    assert environment["EXTRA"] == "1"
