"""Job folders: found by name, copied with overrides; the original is never written to."""

import json
import shutil
from pathlib import Path

import pytest

from fedcmt.config import SERVER_CONFIG, ConfigError, JobConfig
from fedcmt.job_folder import (
    Override,
    add_site,
    apply_overrides,
    cohort_of,
    demo_profile,
    find_job,
    parse_override,
    remove_site,
    stage,
)
from fedcmt.json_file import JsonFileError, read_json

JOBS = Path(__file__).resolve().parents[1] / "jobs"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def made(job: Path, *overrides: Override) -> Path:
    target = job.parents[1] / "workspace" / "job"
    stage(job, target)
    apply_overrides(target, overrides)
    return target


@pytest.mark.parametrize(
    ("text", "override"),
    [
        ("client1.local_steps=10", ("client1.local_steps", 10)),
        ("sites.optimizer.lr=2e-3", ("sites.optimizer.lr", 0.002)),
        ("server.min_sites=null", ("server.min_sites", None)),
        ("sites.mirroring=false", ("sites.mirroring", False)),
        ("sites.channels=[\"T1\"]", ("sites.channels", ["T1"])),
        ("sites.optimizer.name=SGD", ("sites.optimizer.name", "SGD")),
        ("sites.modality=a=b", ("sites.modality", "a=b")),
        ("sites.modality=", ("sites.modality", "")),
    ],
)  # fmt: skip
def test_values_are_json_where_they_are_json_and_else_text(text: str, override: Override) -> None:
    assert parse_override(text) == override


@pytest.mark.parametrize("text", ["server.seed", "seed=3", "=3", ""])
def test_an_override_without_target_or_value_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ConfigError, match=r"expected TARGET\.KEY=VALUE, e\.g\. client1\.local_steps=10"):
        parse_override(text)


def test_the_original_is_never_written_to(job_folder: Path) -> None:
    before = contents(job_folder)
    target = made(job_folder, ("server.num_rounds", 9), ("sites.fold", 2), ("algorithm.mu", 1.0))
    assert contents(job_folder) == before
    assert contents(target) != before


def test_the_copy_leaves_out_the_launcher_s_files(job_folder: Path) -> None:
    (job_folder / "cohort.json").write_text("{}")
    (job_folder / "README.md").write_text("about")
    copied = contents(made(job_folder))
    assert set(contents(job_folder)) - set(copied) == {"demo.json", "cohort.json", "README.md"}
    assert JobConfig.from_folder(job_folder.parents[1] / "workspace" / "job").name == "tiny"


def test_an_earlier_copy_is_replaced_as_a_whole(job_folder: Path) -> None:
    target = made(job_folder, ("server.num_rounds", 9))
    (target / "stale.json").write_text("{}")
    made(job_folder)
    assert JobConfig.from_folder(target).server.num_rounds == 3
    assert not (target / "stale.json").exists()


def test_a_server_override_reaches_the_server(job_folder: Path) -> None:
    job = JobConfig.from_folder(made(job_folder, ("server.num_rounds", 9), ("server.planning.base_features", 8)))
    assert (job.server.num_rounds, job.server.seed) == (9, 5)
    assert job.server.planning == {"base_features": 8}


def test_an_override_of_all_sites_reaches_each(job_folder: Path) -> None:
    job = JobConfig.from_folder(made(job_folder, ("sites.local_steps", 4), ("sites.optimizer.weight_decay", 0.5)))
    assert [site.local_steps for site in job.sites.values()] == [4, 4]
    assert [(s.optimizer.lr, s.optimizer.weight_decay) for s in job.sites.values()] == [(0.25, 0.5), (0.25, 0.5)]


def test_an_override_of_one_site_reaches_that_one(job_folder: Path) -> None:
    job = JobConfig.from_folder(made(job_folder, ("south.local_steps", 4)))
    assert {name: site.local_steps for name, site in job.sites.items()} == {"north": 250, "south": 4}


def test_an_override_of_the_algorithm_reaches_both_halves(job_folder: Path) -> None:
    target = made(job_folder, ("algorithm.mu", 0.1))
    assert JobConfig.from_folder(target).algorithm["args"] == {"mu": 0.1}
    (tensorboard, _) = read_json(target / SERVER_CONFIG)["components"]
    assert tensorboard == {"id": "tensorboard", "path": "x.Y"}


def test_later_overrides_win(job_folder: Path) -> None:
    job = JobConfig.from_folder(made(job_folder, ("south.fold", 3), ("sites.fold", 1), ("north.fold", 2)))
    assert {name: site.fold for name, site in job.sites.items()} == {"north": 2, "south": 1}


def test_an_unknown_target_lists_the_known_ones(job_folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"'client9' is not one of server, algorithm, sites, north, south"):
        made(job_folder, ("client9.fold", 1))


def test_an_override_inside_a_plain_value_is_refused(job_folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"'modality' in .*site\.json is not an object"):
        made(job_folder, ("north.modality.name", "CT"))


def test_an_override_of_an_unknown_key_is_met_when_the_job_is_read(job_folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"unknown keys \['local_step'\]; known keys: .*'local_steps'"):
        JobConfig.from_folder(made(job_folder, ("sites.local_step", 1)))


def test_jobs_are_found_by_name(job_folder: Path) -> None:
    (job_folder.parent / "not_a_job").mkdir()
    assert find_job(job_folder.parent, "tiny") == job_folder
    with pytest.raises(ConfigError, match=r"unknown job 'tin'; jobs in .*: \['tiny'\]"):
        find_job(job_folder.parent, "tin")


def test_demo_and_cohort_are_none_where_there_are_none(job_folder: Path) -> None:
    assert demo_profile(job_folder) == {"about": "generated", "cohort": {}, "set": {"server.num_rounds": 2}}
    (job_folder / "demo.json").unlink()
    assert demo_profile(job_folder) is None
    assert cohort_of(job_folder) is None


def test_a_cohort_may_be_another_job_s(job_folder: Path) -> None:
    other = job_folder.with_name("other")
    other.mkdir()
    (other / "meta.json").write_text("{}")
    (other / "cohort.json").write_text(json.dumps({"source_id": 504}))
    (job_folder / "cohort.json").write_text(json.dumps({"same_as": "other"}))
    assert cohort_of(job_folder) == {"source_id": 504}


def test_an_override_without_a_key_is_refused(tmp_path: Path) -> None:
    stage(JOBS / "brats_sdl", tmp_path / "job")
    with pytest.raises(ConfigError, match=r"expected TARGET\.KEY"):
        apply_overrides(tmp_path / "job", [("server", 1)])


def test_a_job_is_never_copied_onto_itself(tmp_path: Path) -> None:
    source = tmp_path / "job"
    shutil.copytree(JOBS / "brats_sdl", source)
    with pytest.raises(ConfigError, match="inside the job folder"):
        stage(source, source / "copy")
    assert (source / "meta.json").exists()


def newcomer(tmp_path: Path, **changes: object) -> Path:
    file = tmp_path / "mine.json"
    file.write_text(json.dumps({"dataset_id": 77, "modality": "CT"} | changes))
    return file


def test_a_site_that_joins_has_its_own_config_and_the_job_s_algorithm(job_folder: Path, tmp_path: Path) -> None:
    job = made(job_folder, ("algorithm.radius", 0.2))
    add_site(job, "west", newcomer(tmp_path))
    config = JobConfig.from_folder(job)  # checks that all halves of the algorithm agree
    assert config.sites["west"].dataset_id == 77
    assert config.algorithm["args"] == {"radius": 0.2}
    meta = read_json(job / "meta.json")
    assert meta["min_clients"] == len(meta["mandatory_clients"]) == len(config.sites)
    assert "west" in meta["mandatory_clients"]


@pytest.mark.parametrize("name", ["server", "sites", "", "a.b", "../x", "client1"])
def test_a_site_cannot_join_under_a_name_that_is_taken_or_no_name(tmp_path: Path, name: str) -> None:
    stage(JOBS / "brats_sdl", tmp_path / "job")
    with pytest.raises(ConfigError, match="--add-site"):
        add_site(tmp_path / "job", name, newcomer(tmp_path))
    assert set(JobConfig.from_folder(tmp_path / "job").sites) == {"client1", "client2"}


def test_a_site_cannot_join_without_a_configuration(tmp_path: Path) -> None:
    stage(JOBS / "brats_sdl", tmp_path / "job")
    with pytest.raises(ConfigError, match=r"no site\.json there"):
        add_site(tmp_path / "job", "west", tmp_path / "nowhere")


def test_a_broken_configuration_is_named_where_its_owner_keeps_it(tmp_path: Path) -> None:
    stage(JOBS / "brats_sdl", tmp_path / "job")
    (tmp_path / "mine.json").write_text("{dataset_id: 7}")
    with pytest.raises(JsonFileError, match=f"^{tmp_path / 'mine.json'}: not valid JSON"):
        add_site(tmp_path / "job", "west", tmp_path / "mine.json")


def test_a_site_leaves_and_the_last_one_stays(tmp_path: Path) -> None:
    stage(JOBS / "brats_sdl", tmp_path / "job")
    remove_site(tmp_path / "job", "client1")
    assert set(JobConfig.from_folder(tmp_path / "job").sites) == {"client2"}
    for name in ("client1", "client2"):
        with pytest.raises(ConfigError, match=f"--remove-site {name}"):
            remove_site(tmp_path / "job", name)
