"""Startup kits as FLARE provisions them, with our rules."""

from pathlib import Path
from typing import Any

import pytest
from nvflare.lighter.prov_utils import prepare_builders
from nvflare.lighter.provision import prepare_project
from nvflare.lighter.provisioner import Provisioner
from nvflare.lighter.utils import load_yaml

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
    *flare_s, ours = resources["class_allow_list"]
    assert ours == "fedcmt."
    assert len(flare_s) > 50
    assert all(path.startswith("nvflare.") for path in flare_s)


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
