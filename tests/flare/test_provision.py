"""Startup kits as FLARE provisions them, with our rules."""

import importlib
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
from nvflare.apis.executor import Executor
from nvflare.apis.fl_exception import UnsafeComponentError
from nvflare.apis.impl.controller import Controller
from nvflare.app_common.widgets.component_path_authorizer import ComponentPathAuthorizer
from nvflare.lighter.prov_utils import prepare_builders
from nvflare.lighter.provision import prepare_project
from nvflare.lighter.provisioner import Provisioner
from nvflare.lighter.utils import load_yaml

from fedcmt.algorithms.base import Algorithm
from fedcmt.flare.components import allowed_classes
from fedcmt.flare.provision import KitRules
from fedcmt.json_file import read_json

PROJECT = Path(__file__).resolve().parents[2] / "deploy" / "project.yml"


@pytest.fixture(scope="module")
def kits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("network")
    content = load_yaml(str(PROJECT))
    context = Provisioner(str(folder), prepare_builders(content)).provision(prepare_project(content))
    return Path(context.get_result_location())


def local(kits: Path, name: str, file: str) -> dict[str, Any]:
    return read_json(kits / name / "local" / f"{file}.json.default")


@pytest.mark.parametrize("name", ["localhost", "client1", "client2"])
def test_our_classes_are_allowed_beside_flare_s_own(kits: Path, name: str) -> None:
    resources = local(kits, name, "resources")
    assert resources["class_list_enforcement_mode"] == "enforce"
    ours = [path for path in resources["class_allow_list"] if not path.startswith("nvflare.")]
    assert len(resources["class_allow_list"]) - len(ours) > 50
    assert all(issubclass(named(path), (Algorithm, Controller, Executor)) for path in ours)


def named(path: str) -> type:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def test_every_component_of_a_job_of_ours_is_allowed_and_no_function() -> None:
    jobs = Path(__file__).resolve().parents[2] / "jobs"
    used = set()
    for file in jobs.glob("*/*/config/config_fed_*.json"):
        config = read_json(file)
        used |= {entry["path"] for entry in [*config["components"], *config.get("workflows", [])]}
        used |= {entry["executor"]["path"] for entry in config.get("executors", [])}
    assert {"fedcmt.algorithms.fedcmt.FedCMT", "fedcmt.flare.site.SiteExecutor"} <= used
    assert used <= set(allowed_classes())


@pytest.mark.parametrize(
    "path",
    [
        "fedcmt.json_file.write_json",
        "fedcmt.workspace.workspace_folder",
        "fedcmt.algorithms.fedavg.weighted_mean",
        "fedcmt.flare.provision.KitRules",
        "fedcmt.run.main",
    ],
)
def test_flare_refuses_to_call_anything_else_of_the_package(path: str, kits: Path) -> None:
    """A job once wrote a site's own settings by naming the function that writes JSON."""
    workspace = MagicMock()
    workspace.get_resources_file_path.return_value = str(kits / "client1" / "local" / "resources.json.default")
    authorizer = ComponentPathAuthorizer()
    authorizer.authorize_component_config({"path": "fedcmt.algorithms.fedavg.FedAvg"}, workspace=workspace)
    with pytest.raises(UnsafeComponentError, match="is not in allow_list"):
        authorizer.authorize_component_config({"path": path, "args": {}}, workspace=workspace)


@pytest.mark.parametrize("name", ["localhost", "client1", "client2"])
def test_nobody_may_send_code_or_open_a_shell(kits: Path, name: str) -> None:
    permissions = local(kits, name, "authorization")["permissions"]
    assert set(permissions) == {"project_admin", "org_admin", "lead", "member"}
    for rights in permissions.values():
        assert (rights["byoc"], rights["shell_commands"]) == ("none", "none")
    assert permissions["lead"]["submit_job"] == "any"
    assert permissions["project_admin"]["operate"] == "any"
    assert "submit_job" not in permissions["member"]


def test_logs_stay_at_the_sites(kits: Path) -> None:
    resources = local(kits, "client1", "resources")
    assert resources["allow_log_streaming"] is False
    assert "site_log_streamer" not in {component["id"] for component in resources["components"]}


def test_the_server_keeps_jobs_where_the_project_says(kits: Path) -> None:
    resources = local(kits, "localhost", "resources")
    (manager,) = (c for c in resources["components"] if c["id"] == "job_manager")
    assert manager["args"]["uri_root"] == "/var/lib/fedcmt/jobs"
    assert resources["snapshot_persistor"]["args"]["storage"]["args"]["root_dir"] == "/var/lib/fedcmt/snapshots"


@pytest.mark.parametrize("name", ["localhost", "client1"])
def test_jobs_must_be_signed(kits: Path, name: str) -> None:
    (file,) = (kits / name / "startup").glob("fed_*.json")
    assert read_json(file)["require_signed_jobs"] is True


def test_storage_is_an_absolute_folder() -> None:
    with pytest.raises(ValueError, match=r"storage is 'jobs', expected an absolute folder"):
        KitRules("jobs")
