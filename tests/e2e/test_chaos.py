"""Whatever part of a run is killed, and whenever: it completes, or does so resumed, with the weights of one left alone.

Two kills run by default, one in each engine, and twenty-one more with ``-m slow``.
"""

import os
import random
import signal
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path

import psutil
import pytest
import torch

from fedcmt.flare.processes import processes_of
from fedcmt.params import Params, load_tensors
from tests.e2e.conftest import SMALLEST, Finished, command, environment, launch, two_small_datasets

ROUNDS = 4
SITES = ("client1", "client2")
OPTIONS = [*SMALLEST, "--rounds", str(ROUNDS), "--set", "sites.optimizer.lr=0.01"]
KILLS = (
    ("simulator", "fedcmt.site_process"),  # the child that trains
    ("simulator", "nvflare.private.fed.app.simulator.simulator_worker"),  # a site
    ("simulator", "fedcmt.flare.simulator_process"),  # the server
    ("poc", "fedcmt.site_process"),
    ("poc", "nvflare.private.fed.app.client.worker_process"),  # a site's process of the job
    ("poc", "nvflare.private.fed.app.client.client_train"),  # a site
    ("poc", "nvflare.private.fed.app.server.runner_process"),  # the server's process of the job
    ("poc", "nvflare.private.fed.app.server.server_train"),  # the server
)
"""Engine, and the module that the process to be killed runs."""


@pytest.fixture(scope="module")
def variables(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, str]:
    folder = tmp_path_factory.mktemp("data")
    two_small_datasets(folder / "raw")
    return {"nnUNet_raw": str(folder / "raw"), "nnUNet_preprocessed": str(folder / "preprocessed")}


@pytest.fixture(scope="module")
def undisturbed(variables: Mapping[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    workspace = tmp_path_factory.mktemp("undisturbed") / "w"
    run = launch(workspace, "brats_sdl", *OPTIONS, "--engine", "inprocess", extra=variables)
    assert run.code == 0, run.output
    return workspace


def weights(workspace: Path) -> dict[str, Params]:
    """What the server and the sites end with, without the sites' optimisers and random states."""
    found = {"server": load_tensors(workspace / "server" / "state.safetensors")[0]}
    for site in SITES:
        last, _ = load_tensors(workspace / "sites" / site / "last.safetensors")
        found[site] = {name: tensor for name, tensor in last.items() if name.startswith("network/")}
    return found


def victims(workspace: Path, module: str) -> list[psutil.Process]:
    found = []
    for process in processes_of(str(workspace)):
        try:
            if module in process.cmdline():
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return sorted(found, key=lambda process: process.pid)


def killed(workspace: Path, variables: Mapping[str, str], seed: int, engine: str, module: str) -> Finished:
    """A run of which one process is killed some time after it has come to a round."""
    chance = random.Random(seed)
    moment, delay = f"round {chance.randint(1, ROUNDS - 1)}/{ROUNDS} aggregated", chance.uniform(0, 3)
    output, done = "", False
    with subprocess.Popen(
        command(workspace, "brats_sdl", *OPTIONS, "--engine", engine),
        env=environment(variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            output += line
            if not done and moment in line:
                time.sleep(delay)
                victim = chance.choice(victims(workspace, module))
                os.kill(victim.pid, signal.SIGKILL)
                done = True
    assert done, output
    return Finished(process.returncode, output, workspace)


# One kill per engine; the others take an hour.
BY_DEFAULT = (0, 11)


@pytest.mark.parametrize(
    "seed", [pytest.param(seed, marks=() if seed in BY_DEFAULT else pytest.mark.slow) for seed in range(23)]
)
def test_a_run_of_which_a_part_was_killed_ends_as_one_left_alone(
    seed: int, variables: Mapping[str, str], undisturbed: Path, tmp_path: Path
) -> None:
    workspace = tmp_path / "w"
    engine, module = KILLS[seed % len(KILLS)]
    run = killed(workspace, variables, seed, engine, module)
    if run.code != 0:
        assert "Traceback" not in run.output, run.output
        run = launch(workspace, "brats_sdl", "--resume", "--engine", engine, "--threads", "1", extra=variables)
    assert run.code == 0, run.output
    assert set(run.results["sites"]) == set(SITES)
    assert processes_of(str(workspace)) == []
    expected = weights(undisturbed)
    for who, tensors in weights(workspace).items():
        assert tensors.keys() == expected[who].keys()
        for name, tensor in tensors.items():
            torch.testing.assert_close(tensor, expected[who][name], rtol=0, atol=1e-6, msg=f"{who}: {name}")
