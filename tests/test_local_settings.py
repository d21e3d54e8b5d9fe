"""What a site keeps to itself: its settings win over the job's, and its privacy floor refuses what is below it."""

import os
from pathlib import Path

import pytest

from fedcmt.config import SiteConfig
from fedcmt.json_file import JsonFileError
from fedcmt.local_settings import LocalSettings, PrivacyFloor, PrivacyFloorError
from fedcmt.privacy.terms import PrivacyTerms
from fedcmt.workspace import THREADS_VARIABLE

EXAMPLE = Path(__file__).resolve().parents[1] / "deploy" / "fedcmt_site.json"
FLOOR = {"modes": ["instance_dp", "central_client_dp"], "max_epsilon": 8, "min_noise_multiplier": 1.0}
ENOUGH = {"mode": "instance_dp", "noise_multiplier": 1.0, "max_epsilon": 8, "delta": 1e-5, "expected_batch": 4}


def settings(**values: object) -> LocalSettings:
    return LocalSettings.from_dict(values, "fedcmt_site.json")


def check(terms: dict, **floor: object) -> None:
    settings(privacy_floor={**FLOOR, **floor}).check_privacy(terms)


def test_no_file_is_no_settings(tmp_path: Path) -> None:
    assert LocalSettings.from_file(tmp_path / "fedcmt_site.json") == LocalSettings()


def test_the_example_is_read() -> None:
    read = LocalSettings.from_file(EXAMPLE)
    assert read.dataset_id == 1
    assert isinstance(read.privacy_floor, PrivacyFloor)


def test_a_file_that_is_no_object_is_named(tmp_path: Path) -> None:
    file = tmp_path / "fedcmt_site.json"
    file.write_text("[]")
    with pytest.raises(JsonFileError, match=r"fedcmt_site\.json: expected a JSON object"):
        LocalSettings.from_file(file)


def test_what_the_site_says_wins_and_the_rest_is_the_job_s() -> None:
    job = {"dataset_id": 1, "modality": "MR", "device": "cuda", "local_steps": 5}
    merged = settings(dataset_id=7, device="cpu", num_workers=0, threads=2).over(job)
    assert merged == {"dataset_id": 7, "modality": "MR", "device": "cpu", "num_workers": 0, "local_steps": 5}
    assert job["dataset_id"] == 1


def test_what_is_merged_is_a_site_json() -> None:
    merged = settings(dataset_id=7, device="cpu", num_workers=0, num_processes=2, threads=2).over({"modality": "CT"})
    assert SiteConfig.from_dict(merged, "site.json").num_processes == 2


def test_without_settings_the_job_is_left_as_it_is() -> None:
    job = {"dataset_id": 1, "modality": "MR"}
    assert LocalSettings().over(job) == job


def test_folders_and_threads_reach_the_environment_and_others_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("nnUNet_raw", "/before")
    monkeypatch.setenv("nnUNet_results", "/kept")
    monkeypatch.setenv(THREADS_VARIABLE, "1")
    settings(nnUNet_raw="/data/raw", threads=3).apply_to_environment()
    assert (os.environ["nnUNet_raw"], os.environ["nnUNet_results"]) == ("/data/raw", "/kept")
    assert os.environ[THREADS_VARIABLE] == "3"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("dataset_id", 0),
        ("dataset_id", True),
        ("nnUNet_raw", "data/raw"),
        ("nnUNet_results", 3),
        ("device", "gpu"),
        ("num_workers", -1),
        ("num_processes", 0),
        ("threads", 0.5),
        ("privacy_floor", 8),
    ],
)
def test_a_value_that_makes_no_sense_is_named(key: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"^fedcmt_site\.json: {key} is .*, expected "):
        settings(**{key: value})


def test_an_unknown_key_is_refused_so_that_a_misspelt_floor_is_no_open_door() -> None:
    with pytest.raises(TypeError, match=r"unknown keys \['privacy_flor'\]; known keys: .*'privacy_floor'"):
        settings(privacy_flor=FLOOR)


@pytest.mark.parametrize(
    ("floor", "key"),
    [
        ({**FLOOR, "modes": []}, "modes"),
        ({**FLOOR, "modes": "instance_dp"}, "modes"),
        ({**FLOOR, "modes": ["none"]}, "modes"),
        ({**FLOOR, "modes": ["compat_noise"]}, "modes"),
        ({**FLOOR, "modes": [["instance_dp"]]}, "modes"),
        ({**FLOOR, "max_epsilon": 0}, "max_epsilon"),
        ({**FLOOR, "max_epsilon": None}, "max_epsilon"),
        ({**FLOOR, "max_delta": 1}, "max_delta"),
        ({**FLOOR, "min_noise_multiplier": -1}, "min_noise_multiplier"),
        ({**FLOOR, "allow_metrics": "no"}, "allow_metrics"),
        ({"modes": ["instance_dp"]}, "keys"),
    ],
)
def test_a_floor_that_is_none_is_named(floor: dict, key: str) -> None:
    with pytest.raises(ValueError, match=rf"^fedcmt_site\.json: privacy_floor: {key} is .*, expected "):
        settings(privacy_floor=floor)


@pytest.mark.parametrize(
    "terms",
    [ENOUGH, {**ENOUGH, "noise_multiplier": 3.0, "max_epsilon": 0.5}, {**ENOUGH, "delta": 1e-6}],
    ids=["at the floor", "more noise and less epsilon", "less delta"],
)
def test_privacy_at_or_above_the_floor_is_accepted(terms: dict) -> None:
    check(terms)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"max_epsilon": 8.01}, "max_epsilon 8.01, at most 8"),
        ({"max_epsilon": None}, "max_epsilon None, at most 8"),
        ({"noise_multiplier": 0.99}, "noise_multiplier 0.99, at least 1.0"),
        ({"delta": 2e-5}, "delta 2e-05, at most 1e-05"),
        ({"noise": "seeded"}, "noise 'seeded', 'secure'"),
        ({"release_metrics": True}, "release_metrics true, false"),
    ],
)
def test_each_term_below_the_floor_is_refused_by_name(change: dict, told: str) -> None:
    with pytest.raises(PrivacyFloorError) as refused:
        check({**ENOUGH, **change})
    assert str(refused.value) == f"the job's privacy is less than this site accepts (job's, accepted): {told}"


def test_all_that_is_below_the_floor_is_told_at_once() -> None:
    with pytest.raises(PrivacyFloorError, match=r"max_epsilon None.*; noise_multiplier 0\.5"):
        check({**ENOUGH, "max_epsilon": None, "noise_multiplier": 0.5})


@pytest.mark.parametrize("terms", [{}, {"mode": "compat_noise", "sigma": 9}])
def test_a_mode_without_a_guarantee_is_refused(terms: dict) -> None:
    with pytest.raises(PrivacyFloorError, match=r"mode is '(none|compat_noise)', this site accepts"):
        check(terms)


def test_a_mode_that_the_site_does_not_list_is_refused() -> None:
    distributed = {"mode": "distributed_client_dp", "noise_multiplier": 5.0, "max_epsilon": 1}
    with pytest.raises(PrivacyFloorError, match=r"'distributed_client_dp', this site accepts \['inst"):
        check(distributed)


def test_metrics_may_go_where_the_site_allows_them() -> None:
    check({**ENOUGH, "release_metrics": True}, allow_metrics=True)


def test_without_a_floor_every_job_is_accepted() -> None:
    settings().check_privacy({"mode": "none"})


def test_the_terms_a_server_sends_are_read_whole() -> None:
    check(PrivacyTerms.from_dict(ENOUGH, "job").to_dict())
