"""The command, on the demo cohort: refusals, which take seconds, and a whole comparison that is killed half-way."""

import csv
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fedcmt import compare
from fedcmt.compare import main
from fedcmt.compare_jobs import ComparisonError
from fedcmt.compare_runs import append_row

REPOSITORY = Path(__file__).resolve().parents[1]
SMALL = [
    "--rounds", "2", "--local-steps", "2", "--threads", "1",
    "--set", "sites.val_batches=1", "--set", "server.planning.max_patch_size=[16,24,24]",
    "--set", "server.planning.base_features=4", "--set", "server.planning.max_stages=3",
]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "no job given"),
        (["no_such_job"], "unknown job 'no_such_job'"),
        (["fedavg_brats", "--reference", "x"], r"--reference x: expected one of ['fedavg_brats']"),
        (["fedavg_brats", "fedavg_brats"], "come twice"),
        (["fedavg_brats", "ct_mr_fedcmt"], "do not train on the same: sites is ['client1', 'client2'] there"),
        (["hippocampus"], "job 'hippocampus' has no demo cohort"),
        (["fedavg_brats", "--set", "client9.fold=1"], "--set client9.fold: no job has this target"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_anything_runs(
    arguments: list[str],
    expected: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("nnUNet_raw", raising=False)
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 1
    assert expected in capsys.readouterr().err
    assert not (tmp_path / "out" / "nnUNet_raw").exists()
    assert not (tmp_path / "out" / "runs.csv").exists()


@pytest.mark.parametrize("seed", ["-3", "1.5", "x"])
def test_a_seed_that_is_no_whole_number_from_0_is_refused_by_the_parser(
    seed: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["fedavg_brats", "--seed-list", "0", seed, "--out", str(tmp_path / "out")])
    assert f"--seed-list: '{seed}' is not a whole number from 0" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.fixture
def planned_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """The threads that a comparison of one small job would run with, given options; on two cores, without its data."""
    monkeypatch.delenv("nnUNet_raw", raising=False)
    monkeypatch.setattr(compare.os, "cpu_count", lambda: 2)
    monkeypatch.setattr(compare, "make_data", lambda staged, raw: raw)
    (tmp_path / "out").mkdir()

    def plan(*options: str) -> int:
        command = ["fedavg_brats", "--out", str(tmp_path / "out"), *options]
        return compare._prepare(compare._parser().parse_args(command), tmp_path / "out").threads

    return plan


def test_a_folder_with_results_keeps_its_threads_unless_others_are_asked_for(
    planned_threads: Callable[..., int], tmp_path: Path
) -> None:
    assert planned_threads() == 2
    assert planned_threads("--parallel", "2") == 1  # nothing has run
    assert planned_threads() == 2
    append_row(tmp_path / "out" / "runs.csv", {"label": "fedavg_brats", "seed": 0, "settings": "x"})
    assert planned_threads("--parallel", "2") == 2
    assert planned_threads("--threads", "2", "--parallel", "2") == 2
    with pytest.raises(ComparisonError, match="all methods: threads is 2 there and 1 here"):
        planned_threads("--threads", "1")


def test_job_folders_are_no_place_for_results(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fedavg_brats", "--out", str(REPOSITORY / "jobs" / "out")]) == 1
    assert "is inside the job folders" in capsys.readouterr().err
    assert not (REPOSITORY / "jobs" / "out").exists()


def started(out: Path, *options: str) -> subprocess.Popen:
    """A comparison of two tiny jobs with one seed, in a process group of its own."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("nnUNet_")}
    environment["PYTHONPATH"] = str(REPOSITORY / "src")
    command = [sys.executable, "-m", "fedcmt.compare", "fedavg_brats=FedAvg", "brats_sdl=FedCMT", "--seeds", "1"]
    return subprocess.Popen(
        [*command, *SMALL, "--out", str(out), *options],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finished(out: Path) -> list[dict[str, str]]:
    table = out / "runs.csv"
    if not table.exists():
        return []
    with table.open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_comparison_killed_half_way_does_only_what_is_missing(tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = started(out)
    second_run = out / "FedCMT" / "seed0" / "sites"
    deadline = time.monotonic() + 600
    while not second_run.exists() and first.poll() is None and time.monotonic() < deadline:
        time.sleep(0.2)
    os.kill(first.pid, signal.SIGKILL)
    output, _ = first.communicate()
    assert [row["label"] for row in finished(out)] == ["FedAvg"], output
    results = out / "FedAvg" / "seed0" / "results.json"
    written = results.stat().st_mtime_ns

    again = started(out)
    output, _ = again.communicate(timeout=600)
    assert again.returncode == 0, output
    assert "2 runs, 1 of them finished before" in output
    assert results.stat().st_mtime_ns == written
    rows = finished(out)
    assert [row["label"] for row in rows] == ["FedAvg", "FedCMT"]
    assert all(float(row["peak_memory_mib"]) > 50 and float(row["seconds"]) > 0 for row in rows)
    assert float(rows[1]["bytes_sent"]) < float(rows[0]["bytes_sent"])  # decoders stay
    assert "<svg" in (out / "comparison.html").read_text()
    assert "| FedCMT |" in (out / "comparison.md").read_text()

    other = started(out, "--rounds", "3")
    output, _ = other.communicate(timeout=600)
    assert other.returncode == 1
    assert "FedAvg: server.num_rounds is 2 there and 3 here" in output
    assert finished(out) == rows
