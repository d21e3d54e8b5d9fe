"""Every job folder in the repository holds together."""

import importlib
import inspect
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from fedcmt.algorithms.fedcmt import FedCMT
from fedcmt.algorithms.fedopt import FEDCMT_SERVER
from fedcmt.compare_jobs import Frame, Method, stage_methods
from fedcmt.config import SERVER_CONFIG, JobConfig, SiteConfig, build_algorithm, component
from fedcmt.data.partition import COMMON, Equal, Fractions, Patient, Proportions, partition_patients
from fedcmt.data.partition_cut import FRACTION_KEYS
from fedcmt.data.split import dataset_names
from fedcmt.job_folder import apply_overrides, cohort_of, demo_profile, find_job, parse_override, stage
from fedcmt.json_file import read_json
from fedcmt.models.scopes import PERSONAL_ADAPTER
from fedcmt.nnunet.planning_options import PlanningOptions

JOBS = Path(__file__).resolve().parents[1] / "jobs"
EVERY_JOB = pytest.mark.parametrize("job", sorted(JOBS.glob("*/")), ids=lambda path: path.name)
WITH_COHORT = pytest.mark.parametrize(
    "job", sorted(path.parent for path in JOBS.glob("*/cohort.json")), ids=lambda path: path.name
)

POOLED = {
    "brats_central": "brats_fedavg_equal",
    "hippocampus_central": "hippocampus",
    "hippocampus_equal_central": "hippocampus_equal",
    "hippocampus_unequal_central": "hippocampus_unequal",
}
"""Jobs that train on one site what the other job's sites have together."""
REPORT = ("brats_central", "brats_fedavg_equal", "brats_fedavg_unequal", "brats_fedper_unequal")


def meta_of(job: Path) -> dict[str, Any]:
    return read_json(job / "meta.json")


def apps_of(job: Path) -> list[str]:
    return [app for app in meta_of(job)["deploy_map"] if app != "server"]


def client_config(job: Path, app: str) -> Path:
    return job / app / "config" / "config_fed_client.json"


def ids_of(names: Iterable[str]) -> set[int]:
    return {int(name[len("Dataset") :][:3]) for name in names}


def ids_cut(cuts: list[dict[str, Any]]) -> set[int]:
    """Ids of all data sets that some cuts make."""
    return ids_of(dataset_names({"cuts": cuts})) if cuts else set()


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
    cuts = demo.get("cuts", [])
    sources = {one["source_id"] for one in cuts}
    newcomers = {read_json(file)["dataset_id"] for file in JOBS.glob("*/newcomer.json")}
    made = ids_of(demo["cohort"]) | ids_cut(cuts)
    needed = {site.dataset_id for site in config.sites.values()} if made else set()
    assert needed <= made
    # A cut that also pools its sites serves two jobs: one of the sites and one of the pooled data set.
    assert made - newcomers - sources - needed <= ids_cut([one for one in cuts if "pooled" in one])
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
    parts: dict[str, Any] = {"server": config.server, "algorithm": config.algorithm["args"], **config.sites}
    value = parts.get(who, next(iter(config.sites.values())))
    for name in path:
        value = value[name] if isinstance(value, dict) else getattr(value, name)
    return value


@WITH_COHORT
def test_sites_use_the_data_sets_that_the_cohort_cuts(job: Path) -> None:
    cohort = cohort_of(job)
    assert cohort is not None
    assert {site.dataset_id for site in JobConfig.from_folder(job).sites.values()} <= ids_of(dataset_names(cohort))


@pytest.mark.parametrize(("central", "federated"), POOLED.items(), ids=list(POOLED))
def test_a_central_job_trains_as_its_federation_on_the_pooled_data_set(central: str, federated: str) -> None:
    alone, several = (JobConfig.from_folder(JOBS / name) for name in (central, federated))
    own = alone.sites["pooled"]
    assert asdict(alone.server) == asdict(several.server)
    assert [replace(site, dataset_id=own.dataset_id) for site in several.sites.values()] == [own] * len(several.sites)
    cohort = cohort_of(JOBS / central)
    assert cohort is not None
    assert cohort == cohort_of(JOBS / federated)
    assert {own.dataset_id} == ids_of(cut["pooled"] for cut in cohort.get("cuts", [cohort]))


@pytest.mark.parametrize("demo", [False, True], ids=["job", "demo"])
def test_the_fedper_report_s_jobs_differ_in_algorithm_and_data_alone(demo: bool, tmp_path: Path) -> None:
    trainings = []
    for name in REPORT:
        profile = demo_profile(JOBS / name)
        assert profile is not None
        stage(JOBS / name, tmp_path / name)
        apply_overrides(tmp_path / name, profile["set"].items() if demo else [])
        config = JobConfig.from_folder(tmp_path / name)
        sites = [asdict(replace(site, dataset_id=1)) for site in config.sites.values()]
        trainings += [(asdict(config.server), site) for site in sites]
    assert trainings == [trainings[0]] * (1 + 4 + 4 + 4)


def test_the_fedper_report_s_demos_split_one_data_set() -> None:
    demos = [demo_profile(JOBS / name) for name in REPORT]
    sources = [demo["cohort"] for demo in demos if demo is not None]
    assert sources == [sources[0]] * len(REPORT)
    assert len(sources[0]) == 1


@pytest.mark.parametrize(
    ("job", "sizes"), [("brats_fedavg_equal", [65, 65, 64, 64]), ("brats_fedavg_unequal", [129, 64, 39, 26])]
)
def test_t19_the_fedper_report_s_split_of_369_patients(job: str, sizes: list[int]) -> None:
    cohort = cohort_of(JOBS / job)
    assert cohort is not None
    (cut,) = cohort["cuts"]
    sites = tuple(cut["sites"])
    scheme = Proportions(sites, tuple(cut["proportions"])) if "proportions" in cut else Equal(sites)
    parts = Fractions(**{key.removesuffix("_fraction"): cut[key] for key in FRACTION_KEYS})
    patients = [Patient(f"{index:03d}", (f"{index:03d}",)) for index in range(369)]
    made = partition_patients(patients, scheme, parts, seed=cut["seed"])
    assert [sum(made.strata(site).values()) for site in sites] == sizes
    assert (len(made.cases("val", COMMON)), len(made.cases("test", COMMON))) == (55, 56)


@EVERY_JOB
def test_no_file_names_an_absolute_path(job: Path) -> None:
    for file in job.rglob("*.json"):
        absolute = [s for s in strings(json.loads(file.read_text())) if s.startswith(("/", "~")) or ":\\" in s]
        assert absolute == [], file


def test_fedmepd_s_comparison_rows_train_on_the_same_patients(tmp_path: Path) -> None:
    jobs = ("brats_fedmepd", "brats_fedmepd_fedavg", "brats_fedmepd_standalone")
    staged = stage_methods(JOBS, [Method(job, job) for job in jobs], Frame(demo=True), tmp_path)
    mepd, fedavg, standalone = (job.config for job in staged)
    assert [(job.config.server.num_rounds, job.config.sites["fusion"].local_steps) for job in staged] == [
        (11, 10),  # the first round is the fusion site's alone
        (10, 11),
        (10, 11),
    ]
    assert {name for name, site in mepd.sites.items() if site.role == "fusion"} == {"fusion"}
    assert mepd.sites["c5"].dataset_id == standalone.sites["c5"].dataset_id
    own, filled = (
        {n: s for job in staged for n, s in job.recipe["cohort"].items() if n.endswith("C5")}[name]
        for name in ("Dataset935_DemoC5", "Dataset965_DemoC5")
    )
    assert (own["channels"], filled["blank"]) == (["T1ce"], ["FLAIR", "T1", "T2"])
    assert fedavg.sites["c5"].missing_channels


@pytest.mark.parametrize("job", sorted(JOBS.glob("*_fedmepd*/")), ids=lambda path: path.name)
def test_fedmepd_s_jobs_predict_without_mirrored_images_as_published(job: Path) -> None:
    assert {site.mirroring for site in JobConfig.from_folder(job).sites.values()} == {False}


@pytest.mark.parametrize("job", ["brats_sdl", "ct_mr_fedcmt"])
def test_fedcmt_s_jobs_spell_out_the_published_server_so_that_one_field_can_be_set(job: str, tmp_path: Path) -> None:
    stage(JOBS / job, tmp_path / "job")
    assert _fedcmt_of(tmp_path / "job").optimizer == FEDCMT_SERVER
    apply_overrides(tmp_path / "job", [parse_override("algorithm.optimizer.lr=4")])
    assert _fedcmt_of(tmp_path / "job").optimizer == replace(FEDCMT_SERVER, lr=4)


def _fedcmt_of(folder: Path) -> FedCMT:
    algorithm = build_algorithm(JobConfig.from_folder(folder).algorithm)
    assert isinstance(algorithm, FedCMT)
    return algorithm


def test_there_are_jobs() -> None:
    assert {"brats_sdl", "fedavg_brats", "hippocampus"} <= {job.name for job in JOBS.iterdir()}
    assert list(strings({"a": ["/x", {"b": "y"}]})) == ["a", "/x", "b", "y"]
    assert list(named_classes({"c": [{"path": "p", "args": {"q": {"path": "r"}}}]})) == [
        ("p", {"q": {"path": "r"}}),
        ("r", {}),
    ]


@pytest.mark.parametrize("job", ["brats_sdl", "ct_mr_fedcmt"])
@pytest.mark.parametrize(
    ("switch", "is_off"),
    [
        ("algorithm.radius=0", lambda algorithm: algorithm.radius == 0),
        ("algorithm.distillation.maximum=0", lambda algorithm: not algorithm.needs_teacher(9, 10)),
        ("algorithm.adapters=personal", lambda algorithm: algorithm.scopes == PERSONAL_ADAPTER),
        ("algorithm.agreement_exponent=0", lambda algorithm: algorithm.agreement_exponent == 0),
        ("algorithm.optimizer.momentum=0", lambda algorithm: algorithm.optimizer.momentum == 0),
    ],
)
def test_each_part_of_fedcmt_is_switched_off_by_one_setting(
    job: str, switch: str, is_off: Callable[[FedCMT], bool], tmp_path: Path
) -> None:
    """As docs/fedcmt.md lists them; on before, and off at the server and at every site after."""
    staged = tmp_path / job
    stage(JOBS / job, staged)
    before = build_algorithm(JobConfig.from_folder(staged).algorithm)
    assert isinstance(before, FedCMT)
    assert not is_off(before)
    apply_overrides(staged, [parse_override(switch)])
    after = build_algorithm(JobConfig.from_folder(staged).algorithm)
    assert isinstance(after, FedCMT)
    assert is_off(after)
