"""The executor at a site: the site's own settings win over the job's, and its privacy floor holds before any data."""

import json
import os
from pathlib import Path
from unittest.mock import MagicMock

import pytest
from nvflare.apis.event_type import EventType
from nvflare.apis.shareable import Shareable
from nvflare.apis.signal import Signal

from fedcmt.file_lock import exclusive
from fedcmt.flare.codec import decode_answer, encode
from fedcmt.flare.site import SiteExecutor
from fedcmt.messages import Failure, Message
from fedcmt.workspace import THREADS_VARIABLE, WORKSPACE_VARIABLE

FLOOR = {"modes": ["instance_dp"], "max_epsilon": 8}
THIS_JOB = "1b6a2f3c-0d4e-4f5a-8b7c-9d0e1f2a3b4c"
FIRST_JOB = "0f1e2d3c-0000-4000-8000-000000000001"
TERMS = {"mode": "instance_dp", "noise_multiplier": 1.0, "max_epsilon": 8, "expected_batch": 4}


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a provisioned network; what the executor sets goes away with the test."""
    for name in (WORKSPACE_VARIABLE, THREADS_VARIABLE, "nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def context(root: Path, local: dict | None) -> MagicMock:
    """FLARE's context at a site whose kit is in ``root``; the job's site.json names data set 1."""
    for name in ("app", "local"):
        (root / name).mkdir()
    (root / "app" / "site.json").write_text(json.dumps({"dataset_id": 1, "modality": "MR"}))
    algorithm = {"id": "algorithm", "path": "fedcmt.algorithms.fedavg.FedAvg", "args": {}}
    (root / "app" / "config_fed_client.json").write_text(json.dumps({"components": [algorithm]}))
    if local is not None:
        (root / "local" / "fedcmt_site.json").write_text(json.dumps(local))
    found = MagicMock()
    found.get_identity_name.return_value = "north"
    found.get_job_id.return_value = THIS_JOB
    found.get_peer_context.return_value = None
    engine = found.get_engine.return_value
    workspace = engine.get_workspace.return_value
    workspace.get_root_dir.return_value = str(root)
    workspace.get_app_config_dir.return_value = str(root / "app")
    workspace.get_site_config_dir.return_value = str(root / "local")
    return found


def asked(found: MagicMock, privacy: dict, caplog: pytest.LogCaptureFixture, continues: str | None = None) -> str:
    """What the site logs when the server asks it to describe its data, which it cannot: there are none."""
    introduction = {"planning": {}, "job": "tiny", "seed": 0, "num_sites": 2, "federation": "f0"}
    request = Message({**introduction, "continues": continues, "privacy": privacy})
    executor = SiteExecutor()
    reply: Shareable = executor.execute("fingerprint", encode(request, update=False), found, Signal())
    executor.handle_event(EventType.END_RUN, found)
    answer = decode_answer(reply)
    assert isinstance(answer, Failure)
    return f"{answer.reason}\n{caplog.text}"


def test_less_privacy_than_the_floor_is_refused_before_any_data_are_looked_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    found = context(tmp_path, {"nnUNet_raw": "/nowhere", "privacy_floor": FLOOR})
    told = asked(found, {"mode": "none"}, caplog)
    assert told.startswith("PrivacyFloorError in task 'fingerprint', explained in the site's log\n")
    assert "north: task fingerprint failed: the job's privacy mode is 'none'" in told
    assert "/nowhere" not in told
    assert not list(tmp_path.rglob("joined.json"))


def test_enough_privacy_goes_on_to_the_data_that_the_site_itself_names(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    raw = tmp_path / "own_raw"
    raw.mkdir()
    found = context(tmp_path, {"dataset_id": 7, "nnUNet_raw": str(raw), "threads": 1, "privacy_floor": FLOOR})
    told = asked(found, TERMS, caplog)
    assert "PrivacyFloorError" not in told
    assert f"{raw}: no folder Dataset007_*" in told
    assert os.environ[THREADS_VARIABLE] == "1"


def test_without_settings_of_its_own_a_site_does_what_the_job_says(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    told = asked(context(tmp_path, None), {"mode": "none"}, caplog)
    assert "nnUNet_raw is not set" in told
    assert "local/fedcmt_site.json" in told


def test_settings_that_cannot_be_read_stop_the_site_and_are_named_in_its_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    told = asked(context(tmp_path, {"privacy_flor": FLOOR}), TERMS, caplog)
    assert told.startswith("TypeError in task 'fingerprint'")
    assert "fedcmt_site.json: unknown keys ['privacy_flor']" in told


def test_a_job_that_goes_on_with_another_uses_what_that_one_left(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    found = context(tmp_path, None)
    asked(found, {"mode": "none"}, caplog)
    asked(found, {"mode": "none"}, caplog, continues=FIRST_JOB)
    folders = {path.name for path in (tmp_path / "fedcmt").iterdir()}
    assert folders == {THIS_JOB, FIRST_JOB}


@pytest.mark.parametrize("continues", ["../../other", "/tmp", "", FIRST_JOB + "/..", 7])
def test_what_is_no_id_of_a_job_names_no_folder(
    continues: object, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    told = asked(context(tmp_path, None), {"mode": "none"}, caplog, continues)  # type: ignore[arg-type]
    assert told.startswith("ValueError in task 'fingerprint'")
    assert f"continues is {continues!r}, expected the id that FLARE gave to a job" in told
    assert not (tmp_path / "fedcmt").exists()


def test_state_that_another_job_still_uses_is_left_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "fedcmt" / FIRST_JOB / "sites" / "north"
    folder.mkdir(parents=True)
    with exclusive(folder / ".lock"):
        told = asked(context(tmp_path, None), {"mode": "none"}, caplog, continues=FIRST_JOB)
    assert told.startswith("InUseError in task 'fingerprint'")
    assert f"{folder} is in use by another process" in told
