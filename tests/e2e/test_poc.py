"""The POC engine as a user starts it: the numbers of the other engines, and nothing left behind however it ends."""

import signal
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest

from fedcmt.flare.processes import processes_of
from tests.e2e.conftest import SMALLEST, Finished, command, environment, launch, two_small_datasets

OPTIONS = [*SMALLEST, "--set", "server.schedule_rounds=2"]


@pytest.fixture(scope="module")
def variables(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, str]:
    """Two small data sets as a user's own, and a HOME to see what is written there."""
    folder = tmp_path_factory.mktemp("data")
    two_small_datasets(folder / "raw")
    (folder / "home").mkdir()
    return {"nnUNet_raw": str(folder / "raw"), "HOME": str(folder / "home")}


@pytest.fixture(scope="module")
def one_round(variables: Mapping[str, str], tmp_path_factory: pytest.TempPathFactory) -> Finished:
    workspace = tmp_path_factory.mktemp("poc") / "brats_sdl"
    return launch(workspace, "brats_sdl", *OPTIONS, "--engine", "poc", "--rounds", "1", extra=variables)


def test_a_job_runs_in_a_poc_and_shows_what_the_simulator_shows(one_round: Finished) -> None:
    assert one_round.code == 0, one_round.output
    for words in ("POC: starting a server on port", "[client1]", "round 1/1 aggregated from 2 sites", "mean Dice"):
        assert words in one_round.output
    assert one_round.results["engine"] == "poc"
    for site in one_round.results["sites"].values():
        assert (Path(site["model_folder"]) / "fold_all" / "checkpoint_final.pth").is_file()
    logged = (one_round.workspace / "logs" / "flare.log").read_text()
    assert "\nserver: " in logged
    assert "\nclient2: fedcmt| " in logged


def test_it_leaves_no_process_no_key_and_no_trace_in_home(one_round: Finished, variables: Mapping[str, str]) -> None:
    assert processes_of(str(one_round.workspace)) == []
    assert list(one_round.workspace.rglob("*.key")) == []
    assert not (Path(variables["HOME"]) / ".nvflare").exists()


def test_its_curves_are_where_tensorboard_is_told_to_look(one_round: Finished) -> None:
    found = {path.parent.name for path in one_round.workspace.rglob("events.out.tfevents.*")}
    assert found >= {"client1", "client2"}


def test_a_poc_resumed_ends_with_the_scores_of_one_process_that_ran_through(
    one_round: Finished, variables: Mapping[str, str], tmp_path: Path
) -> None:
    resumed = launch(
        one_round.workspace,
        "brats_sdl",
        "--engine",
        "poc",
        "--threads",
        "1",
        "--resume",
        "--rounds",
        "2",
        extra=variables,
    )
    assert resumed.code == 0, resumed.output
    assert "round 1/" not in resumed.output
    through = launch(tmp_path / "w", "brats_sdl", *OPTIONS, "--engine", "inprocess", "--rounds", "2", extra=variables)
    assert through.code == 0, through.output
    for site, ours in through.results["sites"].items():
        theirs = resumed.results["sites"][site]["test"]
        assert theirs["dice"] == pytest.approx(ours["test"]["dice"], abs=1e-6)
        assert theirs["specificity"] == pytest.approx(ours["test"]["specificity"], abs=1e-6)


@pytest.mark.slow
def test_one_that_is_ended_and_one_that_fails_beside_it_leave_nothing(
    variables: Mapping[str, str], tmp_path: Path
) -> None:
    broken = Path(variables["nnUNet_raw"]).parent / "broken"
    subprocess.run(["cp", "-r", variables["nnUNet_raw"], str(broken)], check=True)
    file = next(broken.glob("Dataset802*/imagesTr/*_0001.nii.gz"))
    file.write_bytes(file.read_bytes()[:500])
    fails = start(tmp_path / "fails", {**variables, "nnUNet_raw": str(broken)})
    ended = start(tmp_path / "ended", variables)
    with fails, ended:
        assert ended.stdout is not None
        for line in ended.stdout:
            if "round 1/50" in line:
                break
        assert processes_of(str(tmp_path / "ended"))
        ended.send_signal(signal.SIGTERM)
        assert ended.wait(timeout=60) == 128 + signal.SIGTERM
        assert processes_of(str(tmp_path / "ended")) == []
        assert "interrupted; everything it started has been ended" in ended.stdout.read()
        output, _ = fails.communicate(timeout=300)
    assert fails.returncode == 1, output
    assert "Site 'client2'" in output
    assert "logs/flare.log" in output
    assert "Traceback" not in output
    assert processes_of(str(tmp_path / "fails")) == []
    assert list(tmp_path.rglob("*.key")) == []
    assert list(tmp_path.rglob("cert.json")) == []


def start(workspace: Path, variables: Mapping[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command(workspace, "brats_sdl", *OPTIONS, "--engine", "poc", "--rounds", "50"),
        env=environment(variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
