"""Whole jobs as a user starts them: ``bash start_fl.sh JOB …`` in a child process."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from fedcmt.data.phantoms import make_cohort

REPOSITORY = Path(__file__).resolve().parents[2]
TINY = ["--rounds", "2", "--local-steps", "2", "--set", "sites.val_batches=1"]
"""A job on its demo cohort, with a network that predicts whole test cases in little time."""
for setting in ("server.planning.base_features=6", "server.planning.max_features=24"):
    TINY += ["--set", setting]

SGD = ["--set", "sites.optimizer.name=SGD", "--set", "sites.optimizer.momentum=0.9"]
"""For runs whose weights are compared: a bias before an instance norm has no gradient but rounding noise, which AdamW's
first steps blow up to the size of its learning rate."""


SMALLEST = [*SGD, "--local-steps", "2", "--threads", "1"]
"""The main job on the two data sets of `two_small_datasets`, in seconds."""
for setting in (
    "server.planning.base_features=4",
    "server.planning.max_features=8",
    "server.planning.max_stages=3",
    "server.planning.max_patch_size=[16,16,24]",
    "server.planning.batch_size=2",
    "sites.val_batches=1",
    "sites.mirroring=false",
    "client1.dataset_id=801",
    "client2.dataset_id=802",
):
    SMALLEST += ["--set", setting]


@dataclass(frozen=True)
class Finished:
    """A run that ended: its exit code, all it printed, and its workspace."""

    code: int
    output: str
    workspace: Path

    @property
    def results(self) -> dict:
        return json.loads((self.workspace / "results.json").read_text())


def command(workspace: Path, job: str, *options: str) -> list[str]:
    return ["bash", str(REPOSITORY / "start_fl.sh"), job, "--workspace", str(workspace), *options]


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Without nnU-Net's variables, and with this interpreter first on PATH."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("nnUNet_")}
    own["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{own['PATH']}"
    return own | dict(extra or {})


def launch(workspace: Path, job: str, *options: str, extra: Mapping[str, str] | None = None) -> Finished:
    done = subprocess.run(
        command(workspace, job, *options),
        cwd=workspace.parent if workspace.parent.is_dir() else None,
        env=environment(extra),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
        check=False,
    )
    return Finished(done.returncode, done.stdout, workspace)


def two_small_datasets(raw: Path) -> None:
    """What `SMALLEST` trains on: two sites' brains of five training cases and a test case each."""
    small = {"kind": "brain_mr", "num_train": 5, "num_test": 1, "shape_vox": [24, 28, 20]}
    sites = {"Dataset801_North": {"seed": 1, "style": "site_a"}, "Dataset802_South": {"seed": 2, "style": "site_b"}}
    make_cohort(raw, {name: {**small, **own} for name, own in sites.items()})


@pytest.fixture(scope="session")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """The main job on the demo cohort, a few steps, in FLARE's simulator."""
    run = launch(tmp_path_factory.mktemp("simulated") / "brats_sdl", "brats_sdl", *TINY, *SGD)
    assert run.code == 0, run.output
    return run


@pytest.fixture(scope="session")
def in_process(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """The same job with the same seed, in one process."""
    run = launch(tmp_path_factory.mktemp("inprocess") / "brats_sdl", "brats_sdl", *TINY, *SGD, "--engine", "inprocess")
    assert run.code == 0, run.output
    return run
