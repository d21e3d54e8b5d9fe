"""The simulator as a child process: whatever it started is ended, and what it wrote is kept."""

import os
import signal
from pathlib import Path

import pytest

from fedcmt.flare.processes import EngineError
from fedcmt.flare.simulator import run_simulator
from tests.flare.running import is_running, stand_in


@pytest.mark.parametrize("name", ["my run", "tab\there"])
def test_a_path_with_blanks_is_refused_before_anything_is_written(name: str, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"blanks in its path; give --workspace another"):
        run_simulator(
            tmp_path / "job", tmp_path / name / "flare", ["a"], environment={}, log=tmp_path / "log", on_line=print
        )
    assert not list(tmp_path.iterdir())


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
    with pytest.raises(EngineError, match=r"exit code 3; all it wrote is in .*flare\.log"):
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
    with pytest.raises(EngineError, match=r"process of site 'site-2' died"):
        run_stand_in(tmp_path)


def test_a_site_s_death_does_not_end_a_job_that_can_do_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(tmp_path, f"{DEATH}; echo on", monkeypatch)
    assert run_stand_in(tmp_path, all_sites_needed=False)[-1] == "on"


def test_signal_handlers_come_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGHUP)]
    stand_in(tmp_path, "true", monkeypatch)
    run_stand_in(tmp_path)
    assert [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGHUP)] == before
