"""What goes wrong is met early, by name, with a non-zero exit code, and loses nothing."""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
import SimpleITK as sitk

from tests.e2e.conftest import REPOSITORY, SMALLEST, TINY, Finished, command, environment, launch, two_small_datasets


def refused(run: Finished, *words: str) -> None:
    assert run.code == 1, run.output
    assert "Traceback" not in run.output, run.output
    for word in words:
        assert word in run.output, run.output


@pytest.fixture
def copied_raw(in_process: Finished, tmp_path: Path) -> Path:
    """The demo cohort as a user's own nnUNet_raw."""
    return Path(shutil.copytree(in_process.workspace / "nnUNet_raw", tmp_path / "raw"))


def launch_on(raw: Path, workspace: Path, *options: str) -> Finished:
    ids = ["--set", "client1.dataset_id=901", "--set", "client2.dataset_id=902"]
    return launch(
        workspace, "brats_sdl", *TINY, "--engine", "inprocess", *ids, *options, extra={"nnUNet_raw": str(raw)}
    )


def test_unknown_job_lists_the_known_ones(tmp_path: Path) -> None:
    refused(launch(tmp_path / "w", "brats"), "unknown job 'brats'", "brats_sdl", "hippocampus")


def test_unknown_option_is_an_error(tmp_path: Path) -> None:
    run = launch(tmp_path / "w", "brats_sdl", "--epochs", "3")
    assert run.code == 2
    assert "--epochs" in run.output


def test_unknown_key_lists_the_known_ones(tmp_path: Path) -> None:
    run = launch(tmp_path / "w", "brats_sdl", "--set", "client1.local_step=3")
    refused(run, "unknown keys ['local_step']", "local_steps")


def test_unknown_planning_option_lists_the_known_ones(tmp_path: Path) -> None:
    refused(launch(tmp_path / "w", "brats_sdl", "--set", "server.planning.patch=3"), "patch", "max_patch_size")


def test_job_without_demo_needs_nnunet_raw(tmp_path: Path) -> None:
    refused(launch(tmp_path / "w", "hippocampus"), "nnUNet_raw is not set")


def test_site_without_its_data_set_is_named(tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    run = launch(tmp_path / "w", "brats_sdl", extra={"nnUNet_raw": str(tmp_path / "raw")})
    refused(run, "site 'client1'", "site 'client2'", str(tmp_path / "raw"))


def test_wrong_channel_order_is_named(copied_raw: Path, tmp_path: Path) -> None:
    run = launch_on(copied_raw, tmp_path / "w", "--set", 'client1.channels=["T1","T2","T1ce","FLAIR"]')
    refused(run, "client1", "T1ce")


def test_nan_image_is_named_before_training(copied_raw: Path, tmp_path: Path) -> None:
    file = next(copied_raw.glob("Dataset902*/imagesTr/*_0002.nii.gz"))
    image = sitk.ReadImage(str(file))
    image[1, 2, 3] = float("nan")
    sitk.WriteImage(image, str(file))
    run = launch_on(copied_raw, tmp_path / "w")
    refused(run, "client2", file.name, "NaN")
    assert "round 1" not in run.output


def test_a_site_that_raises_ends_the_simulator_run_and_is_named_with_its_log(copied_raw: Path, tmp_path: Path) -> None:
    file = next(copied_raw.glob("Dataset902*/imagesTr/*_0001.nii.gz"))
    file.write_bytes(file.read_bytes()[:2000])
    ids = ["--set", "client1.dataset_id=901", "--set", "client2.dataset_id=902"]
    run = launch(tmp_path / "w", "brats_sdl", *TINY, *ids, extra={"nnUNet_raw": str(copied_raw)})
    refused(run, "Site 'client2'", file.name, "logs/flare.log")


def test_sites_of_other_channels_cannot_share_everything(copied_raw: Path, tmp_path: Path) -> None:
    folder = next(copied_raw.glob("Dataset902*"))
    for file in folder.glob("images*/*_0003.nii.gz"):
        file.unlink()
    content = json.loads((folder / "dataset.json").read_text())
    del content["channel_names"]["3"]
    (folder / "dataset.json").write_text(json.dumps(content))
    ids = ["--set", "client1.dataset_id=901", "--set", "client2.dataset_id=902"]
    run = launch(
        tmp_path / "w", "fedavg_brats", *TINY, "--engine", "inprocess", *ids, extra={"nnUNet_raw": str(copied_raw)}
    )
    refused(run, "client2", "shape")


def test_workspace_in_use_is_refused(tmp_path: Path) -> None:
    workspace = tmp_path / "w"
    workspace.mkdir()
    with (workspace / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        refused(launch(workspace, "brats_sdl"), str(workspace), "in use")


def test_unwritable_workspace_is_refused(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    refused(launch(blocked / "w", "brats_sdl"), str(blocked))


def test_an_earlier_run_is_set_aside_not_overwritten(in_process: Finished, tmp_path: Path) -> None:
    workspace = tmp_path / "brats_sdl"
    shutil.copytree(in_process.workspace, workspace)
    results = json.loads((workspace / "results.json").read_text())
    model = Path(results["sites"]["client1"]["model_folder"]).relative_to(in_process.workspace)
    weights = (workspace / model / "fold_all" / "checkpoint_final.pth").read_bytes()
    run = launch(workspace, "brats_sdl", *TINY, "--rounds", "1", "--seed", "5", "--engine", "inprocess")
    assert run.code == 0, run.output
    (earlier,) = tmp_path.glob("previous/*")
    assert (earlier / model / "fold_all" / "checkpoint_final.pth").read_bytes() == weights
    assert json.loads((earlier / "results.json").read_text())["sites"].keys() == results["sites"].keys()


def test_a_typo_leaves_a_finished_run_where_it_is(in_process: Finished, tmp_path: Path) -> None:
    workspace = tmp_path / "brats_sdl"
    shutil.copytree(in_process.workspace, workspace)
    before = (workspace / "results.json").read_bytes()
    refused(launch(workspace, "brats_sdl", "--set", "client1.nonsense=1"), "nonsense")
    assert (workspace / "results.json").read_bytes() == before
    assert not (tmp_path / "previous").exists()


def test_a_workspace_inside_the_jobs_is_refused_and_not_made() -> None:
    run = launch(REPOSITORY / "jobs" / "brats_sdl" / "ws", "brats_sdl")
    refused(run, "inside the job folders")
    assert not (REPOSITORY / "jobs" / "brats_sdl" / "ws").exists()


@pytest.mark.parametrize(
    ("setting", "key"), [("server.planning.base_features=16", "planning.base_features"), ("server.seed=9", "seed")]
)
def test_what_a_run_is_made_of_does_not_change_on_resume(in_process: Finished, setting: str, key: str) -> None:
    run = launch(in_process.workspace, "brats_sdl", "--engine", "inprocess", "--resume", "--set", setting)
    refused(run, f"server.{key} is", "since this federation began", "begin a new federation")


def test_a_cohort_is_not_cut_for_sites_that_do_not_use_it(copied_raw: Path, tmp_path: Path) -> None:
    sites = ("uint8_a", "uint8_b", "float32_a", "float32_b")
    ids = [word for site in sites for word in ("--set", f"{site}.dataset_id=988")]
    refused(launch(tmp_path / "w", "hippocampus", *ids, extra={"nnUNet_raw": str(copied_raw)}), str(copied_raw), "988")


def test_a_job_to_run_beside_is_checked_before_the_first_one_starts(tmp_path: Path) -> None:
    several = launch(tmp_path / "w", "brats_sdl", *TINY, "--engine", "inprocess", "--beside", "fedavg_brats")
    refused(several, "--beside fedavg_brats: expected a job of one site", "client2")
    assert not (tmp_path / "w" / "results.json").exists()


def test_resume_without_a_run_is_refused(tmp_path: Path) -> None:
    refused(launch(tmp_path / "w", "brats_sdl", "--resume"), "--resume")


def test_sigterm_leaves_no_process_of_a_simulator_run(tmp_path: Path) -> None:
    workspace = tmp_path / "w"
    two_small_datasets(tmp_path / "raw")
    with subprocess.Popen(
        command(workspace, "brats_sdl", *SMALLEST, "--rounds", "50", "--local-steps", "50"),
        env=environment({"nnUNet_raw": str(tmp_path / "raw")}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if "round 1/50" in line:
                break
        assert _processes_of(workspace)
        started = time.monotonic()
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=30)
        while _processes_of(workspace) and time.monotonic() - started < 30:
            time.sleep(0.5)
        assert not _processes_of(workspace)
    assert process.returncode != 0


def test_a_killed_site_ends_the_simulator_run_at_once_by_name(tmp_path: Path) -> None:
    workspace = tmp_path / "w"
    started, killed = command(workspace, "brats_sdl", *TINY), False
    with subprocess.Popen(
        started, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        output = ""
        for line in process.stdout:
            output += line
            if not killed and "preprocess:" in line and "[client2]" in line:
                (worker,) = [p for p in _processes_of(workspace) if "client2" in psutil.Process(p).cmdline()]
                os.kill(worker, signal.SIGKILL)
                killed = True
    assert killed
    refused(Finished(process.returncode, output, workspace), "site 'client2' died", "flare.log")
    assert not _processes_of(workspace)


def _processes_of(workspace: Path) -> list[int]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and process.environ().get("FEDCMT_WORKSPACE") == str(workspace):
                found.append(process.pid)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found
