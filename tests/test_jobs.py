"""Every job folder in the repository holds together."""

import importlib
import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fedcmt.config import SERVER_CONFIG, JobConfig, SiteConfig, build_algorithm, component
from fedcmt.data.split import dataset_names
from fedcmt.job_folder import apply_overrides, cohort_of, demo_profile, find_job, stage
from fedcmt.json_file import read_json
from fedcmt.nnunet.planning_options import PlanningOptions

JOBS = Path(__file__).resolve().parents[1] / "jobs"
EVERY_JOB = pytest.mark.parametrize("job", sorted(JOBS.glob("*/")), ids=lambda path: path.name)
WITH_COHORT = pytest.mark.parametrize(
    "job", sorted(path.parent for path in JOBS.glob("*/cohort.json")), ids=lambda path: path.name
)


def meta_of(job: Path) -> dict[str, Any]:
    return read_json(job / "meta.json")


def apps_of(job: Path) -> list[str]:
    return [app for app in meta_of(job)["deploy_map"] if app != "server"]


def client_config(job: Path, app: str) -> Path:
    return job / app / "config" / "config_fed_client.json"


def named_classes(node: object) -> Iterator[tuple[str, dict]]:
    """Each ``path`` with its ``args``, at any depth."""
    if isinstance(node, dict):
        if "path" in node:
            yield node["path"], node.get("args", {})
        for value in node.values():
            yield from named_classes(value)
    elif isinstance(node, list):
        for value in node:
            yield from named_classes(value)


def strings(node: object) -> Iterator[str]:
    if isinstance(node, str):
        yield node
    elif isinstance(node, dict | list):
        for value in [*node, *node.values()] if isinstance(node, dict) else node:
            yield from strings(value)


@EVERY_JOB
def test_the_name_is_the_folder_s(job: Path) -> None:
    assert meta_of(job)["name"] == job.name
    assert find_job(JOBS, job.name) == job


@EVERY_JOB
def test_the_deploy_map_is_the_folders(job: Path) -> None:
    meta = meta_of(job)
    folders = {path.name for path in job.iterdir() if path.is_dir()}
    sites = [site for app in apps_of(job) for site in meta["deploy_map"][app]]
    assert set(meta["deploy_map"]) == folders
    assert len(sites) == len(set(sites)) == meta["min_clients"]
    assert sorted(meta["mandatory_clients"]) == sorted(sites)


@EVERY_JOB
def test_every_class_imports_and_takes_its_args(job: Path) -> None:
    found = 0
    for file in job.rglob("config_fed_*.json"):
        for path, args in named_classes(read_json(file)):
            module, _, name = path.rpartition(".")
            inspect.signature(getattr(importlib.import_module(module), name)).bind(**args)
            found += 1
    assert found >= 3 + 2 * len(apps_of(job))


@EVERY_JOB
def test_both_halves_of_the_algorithm_agree(job: Path) -> None:
    server = component(read_json(job / SERVER_CONFIG), "aggregator", job)
    assert [component(read_json(client_config(job, app)), "algorithm", job) for app in apps_of(job)] == [server] * len(
        apps_of(job)
    )


@EVERY_JOB
def test_all_client_configurations_are_identical(job: Path) -> None:
    assert len({client_config(job, app).read_bytes() for app in apps_of(job)}) == 1


@EVERY_JOB
def test_the_job_is_valid_as_it_is(job: Path) -> None:
    config = JobConfig.from_folder(job)
    build_algorithm(config.algorithm)
    PlanningOptions.from_dict(config.server.planning)
    assert config.name == job.name
    ids = [site.dataset_id for site in config.sites.values()]
    assert len(ids) == len(set(ids))


@EVERY_JOB
def test_the_demo_gives_a_valid_job_on_its_own_cohort(job: Path, tmp_path: Path) -> None:
    demo = demo_profile(job) or {"set": {}, "cohort": {}}
    stage(job, tmp_path / "job")
    apply_overrides(tmp_path / "job", demo["set"].items())
    config = JobConfig.from_folder(tmp_path / "job")
    PlanningOptions.from_dict(config.server.planning)
    cut = {"cuts": demo.get("cuts", [])}
    generated = {
        int(name[len("Dataset") :][:3]) for name in [*demo["cohort"], *(dataset_names(cut) if cut["cuts"] else [])]
    }
    sources = {one["source_id"] for one in cut["cuts"]}
    newcomers = {read_json(file)["dataset_id"] for file in JOBS.glob("*/newcomer.json")}
    needed = {site.dataset_id for site in config.sites.values()} if generated else set()
    assert generated - newcomers - sources == needed
    for key, value in demo["set"].items():
        assert config_value(config, key) == value


@pytest.mark.parametrize("file", sorted(JOBS.glob("*/newcomer.json")), ids=lambda path: path.parent.name)
def test_a_newcomer_s_data_set_comes_with_the_demo(file: Path) -> None:
    demo = demo_profile(file.parent)
    assert demo is not None
    site = SiteConfig.from_file(file)
    assert any(name.startswith(f"Dataset{site.dataset_id}_") for name in demo["cohort"])


def config_value(config: JobConfig, key: str) -> object:
    """What an override's key reads as in the job; of all sites, the first's."""
    who, *path = key.split(".")
    value: Any = config.server if who == "server" else config.sites.get(who, next(iter(config.sites.values())))
    for name in path:
        value = value[name] if isinstance(value, dict) else getattr(value, name)
    return value


@WITH_COHORT
def test_sites_use_the_data_sets_that_the_cohort_cuts(job: Path) -> None:
    cohort = cohort_of(job)
    assert cohort is not None
    ids = {int(name[len("Dataset") :][:3]) for name in dataset_names(cohort)}
    assert {site.dataset_id for site in JobConfig.from_folder(job).sites.values()} <= ids


@EVERY_JOB
def test_no_file_names_an_absolute_path(job: Path) -> None:
    for file in job.rglob("*.json"):
        absolute = [s for s in strings(json.loads(file.read_text())) if s.startswith(("/", "~")) or ":\\" in s]
        assert absolute == [], file


def test_there_are_jobs() -> None:
    assert {"brats_sdl", "fedavg_brats", "hippocampus"} <= {job.name for job in JOBS.iterdir()}
    assert list(strings({"a": ["/x", {"b": "y"}]})) == ["a", "/x", "b", "y"]
    assert list(named_classes({"c": [{"path": "p", "args": {"q": {"path": "r"}}}]})) == [
        ("p", {"q": {"path": "r"}}),
        ("r", {}),
    ]
