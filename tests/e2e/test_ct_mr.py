"""CT and MR sites that segment, one that classifies, and one that joins later; as a user runs them."""

import csv
import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch

from fedcmt.params import load_tensors
from tests.e2e.conftest import REPOSITORY, TINY, Finished, environment, launch

FOUNDERS = ("ct_a", "ct_b", "ct_classes", "mr_a", "mr_b")
NEWCOMER = REPOSITORY / "jobs" / "ct_mr_fedcmt" / "newcomer.json"


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """Two rounds of the job on its demo cohort."""
    run = launch(tmp_path_factory.mktemp("mixed") / "w", "ct_mr_fedcmt", *TINY, "--engine", "inprocess")
    assert run.code == 0, run.output
    return run


def personal_files(workspace: Path, sites: Iterable[str] = FOUNDERS) -> dict[str, str]:
    """SHA-256 of every file in which a site keeps a model, its optimiser or its random state."""
    files = [workspace / "sites" / site / name for site in sites for name in ("last.safetensors", "best.safetensors")]
    return {str(path.relative_to(workspace)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def state(workspace: Path) -> tuple[dict[str, torch.Tensor], dict]:
    return load_tensors(workspace / "server" / "state.safetensors")


def joined(run: Finished, target: Path, *options: str) -> Finished:
    """A copy of a run, resumed in process."""
    if not target.exists():
        shutil.copytree(run.workspace, target, symlinks=True, ignore=shutil.ignore_patterns("flare", ".lock"))
    return launch(target, "ct_mr_fedcmt", "--engine", "inprocess", "--resume", *options)


def test_each_task_is_scored_by_its_own_metrics(mixed: Finished) -> None:
    sites = mixed.results["sites"]
    assert set(sites) == set(FOUNDERS)
    assert set(sites["ct_a"]["test"]["dice"]) == {"liver", "kidney", "spleen"}
    assert set(sites["ct_b"]["test"]["dice"]) == {"kidney", "spleen"}
    assert set(sites["mr_b"]["test"]["dice"]) == {"whole_tumor", "tumor_core", "enhancing_tumor"}
    test = sites["ct_classes"]["test"]
    assert {"cases", "accuracy", "balanced_accuracy", "auc", "confusion"} <= set(test)
    assert sum(map(sum, test["confusion"])) == test["cases"] == 12
    assert f"{test['accuracy']:.4f}" in mixed.output


def test_adapters_travel_by_modality_and_slot(mixed: Finished) -> None:
    tensors, _ = state(mixed.workspace)
    weight = "params/encoder.stages.0.0.convs.0.conv.weight"
    slots = {name.partition("@")[2] for name in tensors if name.startswith(f"{weight}@")}
    assert slots == {"ct.ct", "mr.t1", "mr.t1ce", "mr.t2", "mr.flair"}


def test_inference_writes_class_probabilities(mixed: Finished) -> None:
    line = [sys.executable, str(REPOSITORY / "Inference.py"), "--workspace", str(mixed.workspace)]
    done = subprocess.run(
        [*line, "--clients", "ct_classes", "--disable_tta"],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = mixed.results["sites"]["ct_classes"]
    predictions = Path(report["model_folder"]) / "predictions" / "imagesTs"
    with (predictions / "probabilities.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 12
    assert list(rows[0]) == ["case", "predicted", "liver", "kidney", "spleen"]
    assert all(sum(float(row[name]) for name in ("liver", "kidney", "spleen")) == pytest.approx(1) for row in rows)
    assert json.loads((predictions / "metrics.json").read_text())["accuracy"] == report["test"]["accuracy"]


def test_a_site_joins_and_nobody_else_changes(mixed: Finished, tmp_path: Path) -> None:
    before, target = personal_files(mixed.workspace), tmp_path / "w"
    registered = joined(mixed, target, "--add-site", f"mr_c={NEWCOMER}")
    assert registered.code == 0, registered.output
    assert personal_files(target) == before
    assert set(registered.results["sites"]) == {*FOUNDERS, "mr_c"}
    warm = joined(mixed, target, "--rounds", "3", "--set", "sites.local_steps=1", "--set", "sites.val_batches=1")
    assert warm.code == 0, warm.output
    rows = [json.loads(line) for line in (target / "sites" / "mr_c" / "egress.jsonl").read_text().splitlines()]
    (sent,) = [row for row in rows if row["task"] == "train"]
    assert sent["tensors"] == {}  # T1 and FLAIR have slots already, and the encoder is frozen
    assert "weight/mr_c" not in json.loads((target / "server" / "rounds.jsonl").read_text().splitlines()[-1])["server"]
    everyone = personal_files(target, [*FOUNDERS, "mr_c"])
    gone = joined(mixed, target, "--remove-site", "mr_c")
    assert gone.code == 0, gone.output
    assert set(gone.results["sites"]) == set(FOUNDERS)
    assert personal_files(target, [*FOUNDERS, "mr_c"]) == everyone
    back = joined(mixed, target, "--add-site", f"mr_c={NEWCOMER}")
    assert back.code == 0, back.output
    assert set(back.results["sites"]) == {*FOUNDERS, "mr_c"}
    assert personal_files(target, [*FOUNDERS, "mr_c"]) == everyone


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--add-site", f"ct_a={NEWCOMER}"], "has this site already"),
        (["--add-site", "mr_c=nowhere"], "no site.json there"),
        (["--remove-site", "mr_z"], "expected one of several sites"),
    ],
)
def test_a_wrong_change_of_sites_leaves_the_run_as_it_is(mixed: Finished, options: list[str], expected: str) -> None:
    before = personal_files(mixed.workspace)
    run = launch(mixed.workspace, "ct_mr_fedcmt", "--engine", "inprocess", "--resume", *options)
    assert run.code == 1
    assert expected in run.output
    assert "Traceback" not in run.output
    assert personal_files(mixed.workspace) == before


def test_a_site_that_cannot_join_is_not_part_of_the_run(mixed: Finished, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.json"
    wrong.write_text(json.dumps(json.loads(NEWCOMER.read_text()) | {"channels": ["T2", "FLAIR"]}))
    before = personal_files(mixed.workspace)
    run = launch(mixed.workspace, "ct_mr_fedcmt", "--engine", "inprocess", "--resume", "--add-site", f"mr_c={wrong}")
    assert run.code == 1
    assert "T2" in run.output
    assert personal_files(mixed.workspace) == before
    deploy_map = json.loads((mixed.workspace / "job" / "meta.json").read_text())["deploy_map"]
    assert set(deploy_map) == {"server", *FOUNDERS}


def test_sites_change_only_on_resume(tmp_path: Path) -> None:
    run = launch(tmp_path / "w", "ct_mr_fedcmt", "--add-site", f"mr_c={NEWCOMER}")
    assert run.code == 1
    assert "--resume" in run.output
    assert not (tmp_path / "w" / "results.json").exists()
