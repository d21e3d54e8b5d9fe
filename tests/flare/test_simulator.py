"""The simulator as a child process: whatever it started is ended, and what it wrote is kept."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from fedcmt.flare import simulator
from fedcmt.flare.simulator import SimulatorError, child_environment, descendants, end_processes, run_simulator

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


def is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


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
    monkeypatch.setattr(simulator, "_GRACE_SECONDS", 0.5)
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


@pytest.mark.parametrize("name", ["my run", "tab\there"])
def test_a_path_with_blanks_is_refused_before_anything_is_written(name: str, tmp_path: Path) -> None:
    with pytest.raises(SimulatorError, match=r"blanks in its path; give --workspace another"):
        run_simulator(
            tmp_path / "job", tmp_path / name / "flare", ["a"], environment={}, log=tmp_path / "log", on_line=print
        )
    assert not list(tmp_path.iterdir())


def stand_in(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a shell script take the place of the Python interpreter that runs FLARE."""
    path = folder / "python"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(path))


def run_stand_in(folder: Path, **more: bool) -> list[str]:
    lines: list[str] = []
    environment = {"PATH": os.environ["PATH"]}
    flare, log = folder / "flare", folder / "logs" / "flare.log"
    run_simulator(folder / "job", flare, ["a", "b"], environment=environment, log=log, on_line=lines.append, **more)
    return lines


def test_the_simulator_gets_one_thread_per_site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(tmp_path, 'echo "$@"', monkeypatch)
    (line,) = run_stand_in(tmp_path)
    assert line.endswith(f"{tmp_path / 'job'} -w {tmp_path / 'flare'} -c a,b -t 2")


def test_every_line_is_logged_and_handed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(tmp_path, "echo one; echo two >&2; printf three", monkeypatch)
    assert run_stand_in(tmp_path) == ["one", "two", "three"]
    assert (tmp_path / "logs" / "flare.log").read_text() == "one\ntwo\nthree"


def test_another_exit_code_than_zero_is_an_error_that_names_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(tmp_path, "echo broken; exit 3", monkeypatch)
    with pytest.raises(SimulatorError, match=r"exit code 3; all it wrote is in .*flare\.log"):
        run_stand_in(tmp_path)
    assert (tmp_path / "logs" / "flare.log").read_text() == "broken\n"


def test_an_error_while_following_ends_the_simulator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(tmp_path, "echo $$; exec sleep 60", monkeypatch)
    seen: list[int] = []

    def stop(line: str) -> None:
        seen.append(int(line))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_simulator(tmp_path / "job", tmp_path / "f", ["a"], environment={}, log=tmp_path / "log", on_line=stop)
    assert len(seen) == 1
    assert not is_running(seen[0])


def test_a_process_whose_parent_died_first_is_found_by_its_workspace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(tmp_path, "setsid sleep 60 >/dev/null 2>&1 & echo $!", monkeypatch)
    environment = {"PATH": os.environ["PATH"], "FEDCMT_WORKSPACE": str(tmp_path)}
    lines: list[str] = []
    run_simulator(
        tmp_path / "job", tmp_path / "f", ["a"], environment=environment, log=tmp_path / "log", on_line=lines.append
    )
    assert not is_running(int(lines[0]))


DEATH = "echo Subprocess died for client site-2 with code 137"


def test_a_site_s_death_ends_a_job_that_needs_every_site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(tmp_path, f"{DEATH}; exec sleep 60", monkeypatch)
    with pytest.raises(SimulatorError, match=r"process of site 'site-2' died"):
        run_stand_in(tmp_path)


def test_a_site_s_death_does_not_end_a_job_that_can_do_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(tmp_path, f"{DEATH}; echo on", monkeypatch)
    assert run_stand_in(tmp_path, all_sites_needed=False)[-1] == "on"


def test_signal_handlers_come_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGHUP)]
    stand_in(tmp_path, "true", monkeypatch)
    run_stand_in(tmp_path)
    assert [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGHUP)] == before


def test_children_import_the_package_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", f"/other{os.pathsep}/src")
    environment = child_environment(Path("/src"), {"EXTRA": "1"})
    assert environment["PYTHONPATH"] == f"/src{os.pathsep}/other"
    assert environment["EXTRA"] == "1"
