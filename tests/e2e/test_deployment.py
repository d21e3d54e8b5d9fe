"""docs/deployment.md as it stands: its commands, in its order, on a copy of what a user checks out.

Only the ports and the size of the demo cohort differ, so that it runs beside other networks and in minutes.
"""

import json
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from fedcmt.params import load_tensors
from tests.e2e.conftest import REPOSITORY, environment

CHECKED_OUT = ("src", "jobs", "deploy", "start_fl.sh", "pyproject.toml", "requirements.txt", "README.md", "LICENSE")
TAG = "FEDCMT_TEST_NETWORK"


@dataclass
class Network:
    """A network that runs, in a folder as the commands of the document left it."""

    root: Path
    output: str

    def run(self, script: str, **more: str) -> subprocess.CompletedProcess[str]:
        """A script in the folder; `PYTHONPATH` is that of the trial."""
        installed = {
            "PYTHONPATH": str(self.root / "workspace" / "installed"),
            TAG: str(self.root),
            "OMP_NUM_THREADS": "1",
        }
        return subprocess.run(
            ["bash", "-euo", "pipefail", "-c", script],
            cwd=self.root,
            env=environment({**installed, **more}),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=600,
            check=False,
        )

    @property
    def kits(self) -> Path:
        return self.root / "workspace" / "network" / "kits"


def blocks() -> list[str]:
    """The document's commands; those in blocks of ``sh`` are for machines of one's own."""
    return re.findall(r"^```bash\n(.*?)^```", (REPOSITORY / "docs" / "deployment.md").read_text(), re.M | re.S)


def services(root: Path) -> list[psutil.Process]:
    """Every process of the network in this folder."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(TAG) == str(root):
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def check_out(root: Path) -> None:
    for name in CHECKED_OUT:
        source, target = REPOSITORY / name, root / name
        ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
        shutil.copytree(source, target, ignore=ignored) if source.is_dir() else shutil.copyfile(source, target)
    project = root / "deploy" / "project.yml"
    with socket.socket() as probe:
        probe.bind(("", 0))
        project.write_text(project.read_text().replace("8002", str(probe.getsockname()[1])))
    demo = root / "jobs" / "brats_sdl" / "demo.json"
    content = json.loads(demo.read_text())
    for cohort in content["cohort"].values():
        cohort.update(num_train=5, num_test=1, shape_vox=[24, 28, 20])
    demo.write_text(json.dumps(content))


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Network]:
    """The document up to its last step, which follows the tests."""
    made = Network(tmp_path_factory.mktemp("deployment"), "")
    check_out(made.root)
    *before, end = blocks()
    try:
        done = made.run("\n".join(before))
        assert done.returncode == 0, done.stdout
        made.output = done.stdout
        yield made
        ended = made.run(end)
        assert ended.returncode == 0, ended.stdout
        psutil.wait_procs(services(made.root), timeout=30)
        assert services(made.root) == []
    finally:
        for process in services(made.root):
            process.send_signal(signal.SIGKILL)


def results(network: Network, rounds: int = 2) -> tuple[str, dict]:
    """Id and results of the job with so many rounds: two at first, and three for the one that went on."""
    files = network.root.glob("workspace/network/results/*/workspace/results.json")
    found = [(file.parents[1].name, json.loads(file.read_text())) for file in files]
    (result,) = [(job, content) for job, content in found if content["rounds"] == rounds]
    return result


def test_the_job_completes_and_its_results_are_downloaded(network: Network) -> None:
    _, content = results(network)
    assert content["job"] == "brats_sdl"
    assert sorted(content["sites"]) == ["client1", "client2"]
    assert content["rounds"] == 2
    assert "COMPLETED" in network.output


def test_models_are_where_each_site_s_own_settings_say(network: Network) -> None:
    for number, cohort in ((1, "Dataset901_DemoBrainA"), (2, "Dataset902_DemoBrainB")):
        exported = list((network.root / f"workspace/site{number}/nnUNet_results").rglob("checkpoint_final.pth"))
        assert [cohort in file.parts for file in exported] == [True]


def test_each_site_has_its_list_of_what_left(network: Network) -> None:
    job, _ = results(network)
    for site in ("client1", "client2"):
        lines = (network.kits / site / "fedcmt" / job / "sites" / site / "egress.jsonl").read_text().splitlines()
        assert [json.loads(line)["task"] for line in lines].count("train") == 3


def test_the_job_that_went_on_trained_the_one_round_that_was_left(network: Network) -> None:
    first, _ = results(network)
    second, content = results(network, rounds=3)
    assert first != second
    assert {site: told["asked"] for site, told in content["participation"].items()} == {"client1": 3, "client2": 3}
    state, meta = load_tensors(network.kits / "localhost" / "fedcmt" / first / "server" / "state.safetensors")
    assert meta["round"] == 2
    assert state
    assert not list(network.kits.glob(f"*/fedcmt/{second}/**/*.safetensors"))


def test_a_job_that_goes_on_with_other_settings_is_refused(network: Network) -> None:
    first, _ = results(network)
    other = 'cp -r workspace/job workspace/other && sed -i \'s/"seed": [0-9]*/"seed": 77/\' '
    other += "workspace/other/server/config/config_fed_server.json && bash deploy/submit.sh workspace/other"
    job = network.run(other).stdout.strip()
    assert network.run(f"bash deploy/download.sh {job}").returncode != 0
    log = (network.root / f"workspace/network/results/{job}/workspace/log.txt").read_text()
    assert "server.seed is 0 since this federation began and cannot become 77" in log
    state = load_tensors(network.kits / "localhost" / "fedcmt" / first / "server" / "state.safetensors")
    assert state[1]["round"] == 2


def test_the_wheel_is_what_ran(network: Network) -> None:
    found = network.run("python -c 'import fedcmt; print(fedcmt.__path__[0])'").stdout.strip()
    assert found == str(network.root / "workspace" / "installed" / "fedcmt")


def test_only_the_owner_can_read_a_key(network: Network) -> None:
    keys = list((network.root / "workspace" / "network").rglob("*.key"))
    assert len(keys) >= 6
    for path in [*keys, *(network.root / "workspace/network/fedcmt/state").iterdir()]:
        assert path.stat().st_mode & 0o077 == 0, path


def test_a_site_that_runs_is_not_started_again(network: Network) -> None:
    running = (network.kits / "client1" / "daemon_pid.fl").read_text().strip()
    refused = network.run("bash deploy/start.sh client1")
    assert refused.returncode == 1
    assert refused.stdout.endswith(f"start.sh: client1 runs already, as process {running}\n")


def test_a_job_whose_name_leads_out_of_sites_folders_is_refused(network: Network) -> None:
    evil = "cp -r workspace/job workspace/evil && "
    evil += 'sed -i \'s|"name": "brats_sdl"|"name": "../../evil"|\' workspace/evil/meta.json && '
    job = network.run(evil + "bash deploy/submit.sh workspace/evil").stdout.strip()
    assert network.run(f"bash deploy/download.sh {job}").returncode != 0
    log = (network.root / f"workspace/network/results/{job}/workspace/log.txt").read_text()
    assert "meta.json: name is '../../evil', expected the job's name" in log
    assert not list(network.root.rglob("evil_client*"))


def test_a_submitter_without_the_right_is_refused(network: Network) -> None:
    refused = network.run('bash deploy/submit.sh workspace/job "$PWD/workspace/network/kits/member@fedcmt.example"')
    assert refused.returncode == 1, refused.stdout
    assert "is not authorized for 'submit_job'" in refused.stdout


def test_a_job_with_code_in_it_is_refused_where_it_arrives(network: Network) -> None:
    code = "cp -r workspace/job workspace/byoc && mkdir workspace/byoc/client1/custom"
    code += " && echo > workspace/byoc/client1/custom/own.py && bash deploy/submit.sh workspace/byoc"
    job = network.run(code).stdout.strip()
    assert network.run(f"bash deploy/download.sh {job}").returncode != 0
    assert "BYOC not permitted" in network.run(f"bash deploy/status.sh {job}").stdout


def test_a_client_of_another_authority_is_refused(network: Network) -> None:
    other = network.root / "other"
    made = network.run("bash deploy/provision.sh", FEDCMT_NETWORK=str(other))
    assert made.returncode == 0, made.stdout
    log = other / "client1.log"
    command = ["bash", str(other / "kits" / "client1" / "startup" / "sub_start.sh"), "--once"]
    paths = {"PYTHONPATH": str(network.root / "workspace" / "installed"), TAG: str(network.root)}
    with log.open("w") as file, subprocess.Popen(command, env=environment(paths), stdout=file, stderr=file) as client:
        deadline = time.monotonic() + 60
        while "CERTIFICATE_VERIFY_FAILED" not in log.read_text() and time.monotonic() < deadline:
            time.sleep(0.5)
        client.kill()
    assert "CERTIFICATE_VERIFY_FAILED" in log.read_text()
    assert "Successfully registered" not in log.read_text()


def test_nothing_is_written_to_the_user_s_registry_of_kits(network: Network, tmp_path: Path) -> None:
    done = network.run("bash deploy/status.sh", HOME=str(tmp_path))
    assert done.returncode == 0, done.stdout
    assert "client1" in done.stdout
    assert not (tmp_path / ".nvflare").exists()
