"""The POC engine, with a script in the place of FLARE's commands: what they get, what is shown, and what is left."""

import json
import os
import signal
import time
from pathlib import Path

import pytest

from fedcmt.flare import poc
from fedcmt.flare.poc import PROJECT, project, run_poc
from fedcmt.flare.processes import Ended, EngineError, end_workspace
from fedcmt.logs import LAUNCHER_PREFIX
from fedcmt.workspace import WORKSPACE_VARIABLE
from tests.flare.running import is_running, stand_in

FLARE = """
echo "$3 $4 $HOME $*" >> "$CALLS"
kits="$NVFLARE_POC_WORKSPACE/poc/prod_00"
case "$3 $4" in
  "poc prepare")
    mkdir -p "$kits/a" "$kits/server" "$kits/../state"; echo key > "$kits/../state/cert.json"; echo '{"data": {}}' ;;
  "poc start")
    ls -ld "$HOME_OF_POC" "$NVFLARE_POC_WORKSPACE" "$kits/../state/cert.json" > "$MODES"
    printf 'up\\nfedcmt| round 1\\nunfini' > "$kits/server/poc_console.log"; echo a1 > "$kits/a/poc_console.log"
    setsid sleep 60 >/dev/null 2>&1 & echo $! > "$PIDS"
    START
    echo 'INFO: noise'
    echo '{"data": {}}' ;;
  "job submit") echo '{"data": {"job_id": "j1"}}' ;;
  "job wait") printf 'shed\\n' >> "$kits/server/poc_console.log"; WAIT ;;
  "job download") mkdir -p "$7"; echo fetched > "$7/it"; echo '{"data": {}}' ;;
esac
"""
COMPLETED = """echo '{"data": {"status": "COMPLETED"}}'"""
FAILED = """echo '{"status": "error", "message": "Job j1 ended.", "hint": "look"}'; exit 1"""


class Ran:
    """A POC that ran in a folder, up to its error if there was one."""

    def __init__(
        self,
        folder: Path,
        monkeypatch: pytest.MonkeyPatch,
        wait: str = COMPLETED,
        script: str = FLARE,
        start: str = ":",
    ):
        stand_in(folder, script.replace("WAIT", wait).replace("START", start), monkeypatch)
        self.folder = folder / "flare"
        self.lines: list[str] = []
        self._calls, self._pids = folder / "calls", folder / "pids"
        environment = {
            "PATH": os.environ["PATH"],
            "HOME": "/home/user",
            "CALLS": str(self._calls),
            "PIDS": str(self._pids),
            "MODES": str(folder / "modes"),
            "HOME_OF_POC": str(self.folder / "home"),
            WORKSPACE_VARIABLE: str(folder),
        }
        self.log = folder / "logs" / "flare.log"
        self.error: EngineError | None = None
        try:
            run_poc(
                folder / "job", self.folder, ["a"], environment=environment, log=self.log, on_line=self.lines.append
            )
        except EngineError as error:
            self.error = error

    @property
    def calls(self) -> list[list[str]]:
        return [line.split() for line in self._calls.read_text().splitlines()]

    @property
    def services(self) -> list[int]:
        return [int(pid) for pid in self._pids.read_text().split()]


def test_a_job_is_prepared_started_submitted_followed_and_collected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = Ran(tmp_path, monkeypatch)
    assert ran.error is None
    steps = ["poc prepare", "poc start", "job submit", "job wait", "job download"]
    assert [" ".join(call[:2]) for call in ran.calls] == steps
    assert (ran.folder / "result" / "it").read_text() == "fetched\n"


def test_every_line_is_shown_once_and_logged_with_its_service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = Ran(tmp_path, monkeypatch)
    first, *lines = ran.lines
    assert first.startswith(f"{LAUNCHER_PREFIX}POC: starting a server on port")
    assert sorted(lines) == ["a1", "fedcmt| round 1", "unfinished", "up"]
    logged = ["a: a1", "server: fedcmt| round 1", "server: unfinished", "server: up"]
    assert sorted(ran.log.read_text().splitlines()) == logged


def test_only_preparing_gets_a_home_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    homes = {" ".join(call[:2]): call[2] for call in Ran(tmp_path, monkeypatch).calls}
    assert homes.pop("poc prepare") == str(tmp_path / "flare" / "home")
    assert set(homes.values()) == {"/home/user"}


def test_services_end_and_keys_go_with_the_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = Ran(tmp_path, monkeypatch)
    assert [is_running(pid) for pid in ran.services] == [False]
    assert sorted(path.name for path in ran.folder.iterdir()) == ["project.yml", "result"]


def test_a_job_that_fails_is_an_error_with_its_reason_and_leaves_no_service(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = Ran(tmp_path, monkeypatch, wait=FAILED)
    what = "the job did not complete in FLARE's POC: Job j1 ended.; look"
    assert str(ran.error) == f"{what}; all that was logged is in {ran.log}"
    assert [is_running(pid) for pid in ran.services] == [False]
    assert sorted(path.name for path in ran.folder.iterdir()) == ["project.yml"]
    assert "unfinished" in ran.lines


def test_keys_are_made_where_nobody_else_can_read_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Ran(tmp_path, monkeypatch)
    modes = [line.split()[0] for line in (tmp_path / "modes").read_text().splitlines()]
    assert sorted(modes) == ["-rw-------", "drwx------", "drwx------"]


@pytest.mark.parametrize(
    ("line", "whose"),
    [
        ("FederatedServer - INFO - Failing job 1f-2 due to reported failure from north_2: exception", "site 'north_2'"),
        ("ServerEngine - INFO - Job: 1f-2 child process exit with return code 1", "the server"),
    ],
)
def test_a_process_of_the_job_that_dies_is_named_with_what_to_do(
    line: str, whose: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = Ran(tmp_path, monkeypatch, wait=f'echo "{line}" >> "$kits/server/poc_console.log"; {FAILED}')
    reason = "it was killed, ran out of memory or crashed"
    what = f"the job's process at {whose} died ({reason})"
    assert str(ran.error) == f"{what}; all that was logged is in {ran.log}"


def test_a_poc_that_does_not_start_is_an_error_with_what_flare_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = 'case "$4" in start) echo port taken >&2; exit 2 ;; *) mkdir -p "$NVFLARE_POC_WORKSPACE" ;; esac'
    ran = Ran(tmp_path, monkeypatch, script=script)
    assert str(ran.error) == f"nvflare poc start failed: port taken; all that was logged is in {ran.log}"


def test_what_services_wrote_before_a_start_failed_is_logged_and_their_keys_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = Ran(tmp_path, monkeypatch, start="exit 2")
    assert str(ran.error).startswith("nvflare poc start failed: ")
    assert "a: a1" in ran.log.read_text().splitlines()
    assert sorted(path.name for path in ran.folder.iterdir()) == ["project.yml"]


@pytest.mark.parametrize(
    ("number", "raised"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Ended), (signal.SIGHUP, Ended)]
)
def test_a_signal_while_it_starts_and_one_while_it_cleans_up_leave_neither_service_nor_key(
    number: signal.Signals, raised: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def end(workspace: str | None) -> None:
        os.kill(os.getpid(), number)
        end_workspace(workspace)

    monkeypatch.setattr(poc, "end_workspace", end)
    with pytest.raises(raised):
        Ran(tmp_path, monkeypatch, start=f"kill -{number.value} {os.getpid()}; exec sleep 60")
    assert not is_running(int((tmp_path / "pids").read_text()))
    assert sorted(path.name for path in (tmp_path / "flare").iterdir()) == ["project.yml"]


def test_a_terminal_that_is_gone_does_not_keep_the_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def closed(line: str) -> None:
        if line == "up":
            raise BrokenPipeError

    stand_in(tmp_path, FLARE.replace("WAIT", "exec sleep 60").replace("START", ":"), monkeypatch)
    variables = {name: str(tmp_path / name) for name in ("CALLS", "PIDS", "MODES", "HOME_OF_POC")}
    environment = {"PATH": os.environ["PATH"], WORKSPACE_VARIABLE: str(tmp_path), **variables}
    with pytest.raises(BrokenPipeError):
        run_poc(tmp_path / "job", tmp_path / "f", ["a"], environment=environment, log=tmp_path / "log", on_line=closed)
    assert sorted(path.name for path in (tmp_path / "f").iterdir()) == ["project.yml"]


def test_an_interruption_while_following_ends_the_services(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sleep, calls = time.sleep, tmp_path / "calls"
    interruptions = [KeyboardInterrupt()]

    # Waiting for any command may sleep; the interruption comes while the submitted job is followed.
    def interrupt(seconds: float) -> None:
        if interruptions and calls.is_file() and "job wait" in calls.read_text():
            raise interruptions.pop()
        sleep(seconds)

    monkeypatch.setattr(time, "sleep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        Ran(tmp_path, monkeypatch, wait="exec sleep 60")
    assert not is_running(int((tmp_path / "pids").read_text()))


def test_a_service_that_dies_while_its_job_is_followed_is_an_error_with_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = "sh -c 'sleep 60; :' -m nvflare.private.fed.app.client.client_train -m $kits/a -s fed_client.json"
    script = FLARE.replace("setsid sleep 60", f"setsid {service}")
    ran = Ran(tmp_path, monkeypatch, wait="kill -9 $(cat $PIDS); exec sleep 60", script=script)
    what = "the process of 'a' ended while the job ran"
    assert str(ran.error) == f"{what}; all that was logged is in {ran.log}"
    assert [is_running(pid) for pid in ran.services] == [False]


def test_what_an_earlier_poc_left_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stale = tmp_path / "flare" / "result" / "stale"
    stale.mkdir(parents=True)
    assert Ran(tmp_path, monkeypatch).error is None
    assert not stale.exists()


def test_a_path_with_blanks_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="blanks in its path"):
        run_poc(tmp_path / "job", tmp_path / "my run", ["a"], environment={}, log=tmp_path / "log", on_line=print)
    assert not list(tmp_path.iterdir())


def test_the_project_holds_the_sites_the_port_and_our_rules() -> None:
    made = json.loads(json.dumps(project(["north", "south_2"], 18000)))
    assert made["name"] == PROJECT
    server, *others = made["participants"]
    assert (server["fed_learn_port"], server["admin_port"]) == (18000, 18000)
    assert [p["name"] for p in others if p["type"] == "client"] == ["north", "south_2"]
    assert made["builders"][-1]["path"] == "fedcmt.flare.provision.KitRules"
