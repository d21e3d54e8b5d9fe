import json
from pathlib import Path

import pytest

from fedcmt.compare_jobs import (
    ComparisonError,
    Frame,
    Method,
    StagedJob,
    adopt,
    flattened,
    make_data,
    method_settings,
    parse_job,
    parse_variant,
    pooled,
    readable_settings,
    remember_settings,
    settings_hash,
    sites_of_test_cases,
    stage_methods,
)
from fedcmt.config import ConfigError

FEDAVG = {"path": "fedcmt.algorithms.fedavg.FedAvg", "args": {}}
FEDCMT = {"path": "fedcmt.algorithms.fedcmt.FedCMT", "args": {"radius": 0.25}}
FEDMEPD = {"path": "fedcmt.algorithms.fedmepd.FedMEPD", "args": {}}


def write_job(
    jobs: Path,
    name: str,
    sites: dict[str, dict],
    algorithm: dict = FEDAVG,
    rounds: int = 3,
    planning: dict | None = None,
) -> None:
    """A job folder as under ``jobs/``; each site has a data set, and whatever else is given."""
    arguments = {"num_rounds": rounds, "planning": planning or {}}
    workflow = {"id": "rounds", "path": "fedcmt.flare.server.FederatedRounds", "args": arguments}
    files: dict[str, dict] = {
        "meta.json": {"name": name, "deploy_map": {"server": ["server"], **{site: [site] for site in sites}}},
        "server/config/config_fed_server.json": {
            "workflows": [workflow],
            "components": [{"id": "aggregator", **algorithm}],
        },
    }
    for site, values in sites.items():
        files[f"{site}/config/config_fed_client.json"] = {"components": [{"id": "algorithm", **algorithm}]}
        files[f"{site}/config/site.json"] = {"modality": "MR", "local_steps": 5, **values}
    for file, content in files.items():
        path = jobs / name / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))


def write_dataset(raw: Path, dataset_id: int, train: list[str], test: list[str], labels: dict | None = None) -> None:
    folder = raw / f"Dataset{dataset_id:03d}_X"
    for split, cases in (("Tr", train), ("Ts", test)):
        for kind, ending in (("images", "_0000.nii.gz"), ("labels", ".nii.gz")):
            (folder / f"{kind}{split}").mkdir(parents=True)
            for case in cases:
                (folder / f"{kind}{split}" / f"{case}{ending}").touch()
    content = {"channel_names": {"0": "T1"}, "labels": labels or {"background": 0, "x": 1}, "file_ending": ".nii.gz"}
    (folder / "dataset.json").write_text(json.dumps({**content, "numTraining": len(train)}))


@pytest.fixture
def jobs(tmp_path: Path) -> Path:
    """Two federations on the same two data sets, a third on others, and a site with all cases."""
    folder = tmp_path / "jobs"
    both = {"north": {"dataset_id": 1}, "south": {"dataset_id": 2}}
    write_job(folder, "plain", both)
    write_job(folder, "adapters", both, FEDCMT)
    write_job(folder, "elsewhere", {"north": {"dataset_id": 7}, "east": {"dataset_id": 2}}, FEDCMT)
    write_job(folder, "central", {"pooled": {"dataset_id": 3, "optimizer": {"lr": 0.5}}}, rounds=3)
    return folder


@pytest.fixture
def raw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "raw"
    write_dataset(folder, 1, ["n1", "n2"], ["n3"])
    write_dataset(folder, 2, ["s1"], ["s2", "s3"])
    write_dataset(folder, 3, ["n1", "n2", "s1"], ["n3", "s2", "s3"])
    monkeypatch.setenv("nnUNet_raw", str(folder))
    return folder


def staged(jobs: Path, *names: str, frame: Frame | None = None) -> list[StagedJob]:
    return stage_methods(jobs, [parse_job(name) for name in names], frame or Frame(), jobs.parent / "staged")


# ---------------------------------------------------------------------------------------------------------------------
# Names


def test_a_job_is_its_own_label_unless_it_is_given_one() -> None:
    assert parse_job("fedavg_brats") == Method("fedavg_brats", "fedavg_brats")
    assert parse_job("fedavg_brats=FedAvg") == Method("FedAvg", "fedavg_brats")


def test_a_comma_inside_a_json_value_does_not_part_settings() -> None:
    text = 'sgd=brats_sdl,algorithm.optimizer={"name": "sgd", "lr": 1.0},algorithm.distillation.maximum=0'
    assert parse_variant(text) == Method(
        "sgd",
        "brats_sdl",
        (("algorithm.optimizer", {"name": "sgd", "lr": 1.0}), ("algorithm.distillation.maximum", 0)),
    )


@pytest.mark.parametrize("text", ["a=b c", "a=../x", "a=", "a=x__y", "a=jobs", "a=preprocessed"])
def test_a_label_that_cannot_be_a_folder_is_refused(text: str) -> None:
    with pytest.raises(ComparisonError, match="cannot be a label"):
        parse_job(text)


def test_a_variant_needs_a_job_and_whole_settings() -> None:
    with pytest.raises(ComparisonError, match="expected LABEL=JOB"):
        parse_variant("label")
    with pytest.raises(ConfigError, match=r"unknown job 'job,radius'"):
        stage_methods(Path("jobs"), [parse_variant("label=job,radius")], Frame(), Path("unused"))


# ---------------------------------------------------------------------------------------------------------------------
# Staging


def test_settings_reach_every_job_and_a_variant_s_own_only_that(jobs: Path) -> None:
    frame = Frame((("server.num_rounds", 2), ("north.local_steps", 5)))
    methods = [Method("a", "adapters"), Method("b", "adapters", (("algorithm.radius", 0),))]
    one, other = stage_methods(jobs, methods, frame, jobs.parent / "staged")
    assert one.config.server.num_rounds == other.config.server.num_rounds == 2
    assert one.config.algorithm["args"] == {"radius": 0.25}
    assert other.config.algorithm["args"] == {"radius": 0}
    assert (one.config.name, other.config.name) == ("a", "b")


def test_job_folders_are_only_read(jobs: Path) -> None:
    before = {path: path.read_bytes() for path in jobs.rglob("*") if path.is_file()}
    staged(jobs, "plain", "central", frame=Frame((("sites.fold", "all"),), on="adapters"))
    assert {path: path.read_bytes() for path in jobs.rglob("*") if path.is_file()} == before


def test_on_takes_only_the_algorithm_of_other_jobs(jobs: Path) -> None:
    plain, moved = staged(jobs, "plain", "elsewhere", frame=Frame(on="plain"))
    assert list(moved.config.sites) == ["north", "south"]
    assert moved.config.sites == plain.config.sites
    assert moved.config.algorithm == FEDCMT
    assert plain.config.algorithm == FEDAVG


def test_on_gives_a_one_site_job_the_training_settings_of_the_federation(jobs: Path) -> None:
    """They stand in the files of the federation's job and differ from those of the one-site job and from defaults."""
    trained = {"optimizer": {"lr": 0.125}, "local_steps": 6, "grad_clip": 2.0}
    sites = {"north": {"dataset_id": 1, **trained}, "south": {"dataset_id": 2, **trained}}
    write_job(jobs, "host", sites, rounds=4, planning={"batch_size": 2})
    _, central = staged(jobs, "host", "central", frame=Frame(on="host"))
    site = central.config.sites["pooled"]
    assert (site.dataset_id, site.optimizer.lr, site.local_steps, site.grad_clip) == (3, 0.125, 6, 2.0)
    assert (central.config.server.num_rounds, central.config.server.planning) == (4, {"batch_size": 2})


def test_sites_that_differ_in_training_settings_cannot_give_them_to_a_one_site_job(jobs: Path) -> None:
    differing = Frame((("north.optimizer.lr", 0.25),), on="plain")
    with pytest.raises(ComparisonError, match=r"^central: the sites of plain \(--on\) differ in \['optimizer'\]"):
        staged(jobs, "plain", "central", frame=differing)


def test_other_sites_are_refused_by_name(jobs: Path) -> None:
    expected = (
        r"plain and elsewhere do not train on the same: sites is \['north', 'south'\] there and \['east', 'north'\]"
    )
    with pytest.raises(ComparisonError, match=expected):
        staged(jobs, "plain", "elsewhere")


@pytest.mark.parametrize(
    ("overrides", "advised"),
    [
        ((("north.dataset_id", 8), ("south.dataset_id", 9)), True),
        ((("north.dataset_id", 8), ("south.fold", 3)), False),
        ((("south.fold", 3),), False),
    ],
)
def test_jobs_that_differ_in_data_sets_alone_are_perhaps_of_two_splits(
    jobs: Path, overrides: tuple, advised: bool
) -> None:
    methods = [Method("a", "plain"), Method("b", "adapters", overrides)]
    with pytest.raises(ComparisonError) as refused:
        stage_methods(jobs, methods, Frame(), jobs.parent / "staged")
    assert str(refused.value).endswith(", or compare jobs of one split at a time.") == advised


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        (("south.dataset_id", 9), r"south.dataset_id is 2 there and 9 here"),
        (("north.fold", 3), r"north.fold is 0 there and 3 here"),
        (("south.local_steps", 6), r"steps of south is 15 there and 18 here"),
    ],
)
def test_other_data_folds_or_steps_are_refused_by_name(jobs: Path, override: tuple, expected: str) -> None:
    methods = [Method("a", "plain"), Method("b", "adapters", (override,))]
    with pytest.raises(ComparisonError, match=expected):
        stage_methods(jobs, methods, Frame(), jobs.parent / "staged")


def test_steps_are_counted_in_the_turns_that_a_site_gets(jobs: Path) -> None:
    """FedMEPD's first round is the fusion site's alone, so its 4 rounds of 5 are 15 steps at the other site."""
    write_job(jobs, "turns", {"north": {"dataset_id": 1}, "south": {"dataset_id": 2, "role": "fusion"}}, FEDMEPD, 4)
    with pytest.raises(ComparisonError, match=r"steps of south is 15 there and 20 here"):
        staged(jobs, "plain", "turns")
    methods = [Method("a", "plain", (("south.local_steps", 8),)), Method("b", "turns", (("south.local_steps", 6),))]
    stage_methods(jobs, methods, Frame(), jobs.parent / "staged")


def test_a_one_site_job_must_take_as_many_steps(jobs: Path) -> None:
    methods = [Method("a", "plain"), Method("b", "central", (("server.num_rounds", 4),))]
    with pytest.raises(ComparisonError, match=r"steps of pooled is 15 there and 20 here.*--rounds"):
        stage_methods(jobs, methods, Frame(), jobs.parent / "staged")


def test_a_one_site_job_must_hold_back_the_same_part(jobs: Path) -> None:
    methods = [Method("a", "plain"), Method("b", "central", (("sites.fold", "all"),))]
    with pytest.raises(ComparisonError, match="fold differs"):
        stage_methods(jobs, methods, Frame(), jobs.parent / "staged")


def test_a_label_may_come_once(jobs: Path) -> None:
    with pytest.raises(ComparisonError, match=r"labels \['plain'\] come twice"):
        staged(jobs, "plain", "plain")


def test_a_setting_of_no_job_is_refused(jobs: Path) -> None:
    with pytest.raises(ComparisonError, match=r"--set west.fold: no job has this target"):
        staged(jobs, "plain", frame=Frame((("west.fold", 1),)))


def test_an_algorithm_s_unknown_setting_is_refused_before_anything_runs(jobs: Path) -> None:
    with pytest.raises(ConfigError, match="raduis"):
        stage_methods(jobs, [Method("a", "adapters", (("algorithm.raduis", 0),))], Frame(), jobs.parent / "staged")


def test_the_demo_cohort_needs_a_demo_profile(jobs: Path) -> None:
    with pytest.raises(ComparisonError, match=r"no demo cohort \(jobs/plain/demo.json\)"):
        staged(jobs, "plain", frame=Frame(demo=True))


def test_the_demo_profile_sets_values_that_options_override(jobs: Path) -> None:
    profile = {"about": "x", "cohort": {"Dataset001_A": {}}, "set": {"server.num_rounds": 9, "sites.local_steps": 8}}
    (jobs / "plain" / "demo.json").write_text(json.dumps(profile))
    (job,) = staged(jobs, "plain", frame=Frame((("server.num_rounds", 2),), demo=True))
    assert (job.config.server.num_rounds, job.config.sites["north"].local_steps) == (2, 8)
    assert job.recipe == {"cohort": {"Dataset001_A": {}}, "cuts": []}


def test_with_on_an_algorithm_keeps_its_own_demo_settings(jobs: Path) -> None:
    for name, value in (("plain", {"sites.local_steps": 4}), ("elsewhere", {"algorithm.radius": 0.5, "sites.fold": 2})):
        profile = {"about": "x", "cohort": {"Dataset001_A": {}}, "set": value}
        (jobs / name / "demo.json").write_text(json.dumps(profile))
    _, moved = staged(jobs, "plain", "elsewhere", frame=Frame(on="plain", demo=True))
    assert moved.config.algorithm["args"] == {"radius": 0.5}
    assert (moved.config.sites["north"].local_steps, moved.config.sites["north"].fold) == (4, 0)


def test_adopted_jobs_lie_under_their_labels(jobs: Path, tmp_path: Path) -> None:
    before = staged(jobs, "plain=x", "adapters")
    after = adopt(before, tmp_path / "final")
    assert [job.config.folder for job in after] == [tmp_path / "final" / "x", tmp_path / "final" / "adapters"]
    assert [method_settings(job) for job in after] == [method_settings(job) for job in before]


# ---------------------------------------------------------------------------------------------------------------------
# Settings


def test_the_seed_is_no_setting_and_everything_else_is(jobs: Path) -> None:
    def settings(*overrides: tuple) -> dict:
        return method_settings(staged(jobs, "plain", frame=Frame(overrides))[0])

    base = settings_hash(settings())
    assert settings_hash(settings(("server.seed", 7))) == base
    assert settings_hash(settings(("north.grad_clip", 2.0))) != base
    assert settings_hash(settings(("server.planning.batch_size", 2))) != base


def test_settings_of_finished_runs_must_stay_and_methods_may_be_added(tmp_path: Path) -> None:
    path = tmp_path / "settings.json"
    remember_settings(path, {"engine": "inprocess"}, {"a": {"server": {"num_rounds": 2}}}, set())
    remember_settings(path, {"engine": "inprocess"}, {"b": {"server": {"num_rounds": 3}}}, {"a"})
    assert set(json.loads(path.read_text())["methods"]) == {"a", "b"}
    with pytest.raises(ComparisonError, match=r"a: server.num_rounds is 2 there and 5 here"):
        remember_settings(path, {"engine": "inprocess"}, {"a": {"server": {"num_rounds": 5}}}, {"a", "b"})
    with pytest.raises(ComparisonError, match="all methods: engine is 'inprocess' there and 'simulator' here"):
        remember_settings(path, {"engine": "simulator"}, {"c": {}}, {"a", "b"})
    assert set(json.loads(path.read_text())["methods"]) == {"a", "b"}


def test_settings_without_a_result_bind_nobody(tmp_path: Path) -> None:
    path = tmp_path / "settings.json"
    remember_settings(path, {"engine": "inprocess"}, {"a": {"fold": 0}, "b": {"fold": 0}}, set())
    remember_settings(path, {"engine": "simulator"}, {"a": {"fold": 1}, "b": {"fold": 1}}, set())
    remember_settings(path, {"engine": "simulator"}, {"b": {"fold": 2}}, {"a"})
    kept = {"common": {"engine": "simulator"}, "methods": {"a": {"fold": 1}, "b": {"fold": 2}}}
    assert json.loads(path.read_text()) == kept


def test_a_value_that_all_sites_share_is_shown_once(jobs: Path) -> None:
    (job,) = staged(jobs, "plain", frame=Frame((("south.grad_clip", 2.0),)))
    settings = readable_settings(job)
    assert (settings["sites.optimizer.lr"], settings["server.num_rounds"]) == (3e-4, 3)
    assert (settings["north.grad_clip"], settings["south.grad_clip"]) == (1.0, 2.0)
    assert not {"sites.grad_clip", "north.dataset_id", "sites.modality", "server.seed"} & set(settings)


def test_nested_settings_have_dotted_keys() -> None:
    assert flattened({"a": {"b": {"c": 1}, "d": []}, "e": {}}) == {"a.b.c": 1, "a.d": [], "e": {}}


# ---------------------------------------------------------------------------------------------------------------------
# Data


def test_test_cases_of_pooled_data_go_to_the_site_they_are_of(jobs: Path, raw: Path) -> None:
    all_jobs = staged(jobs, "plain", "central")
    assert [job.method.label for job in pooled(all_jobs)] == ["central"]
    assert make_data(all_jobs, raw.parent / "own") == raw
    assert sites_of_test_cases(all_jobs, raw) == {"n3": "north", "s2": "south", "s3": "south"}


def test_jobs_of_one_site_alone_are_a_federation_of_their_own(jobs: Path, raw: Path) -> None:
    alone = staged(jobs, "central")
    assert pooled(alone) == []
    assert sites_of_test_cases(alone, raw) == {}


@pytest.mark.parametrize(
    ("train", "test", "expected"),
    [
        (["n1", "n2"], ["n3", "s2", "s3"], r"training cases: 1 are missing, e.g. s1"),
        (["n1", "n2", "s1", "q"], ["n3", "s2", "s3"], r"training cases: 1 are of no site's data set, e.g. q"),
        (["n1", "n2", "s1"], ["n3", "s2"], r"test cases: 1 are missing, e.g. s3"),
    ],
)
def test_pooled_data_must_be_the_sites_data(
    jobs: Path, tmp_path: Path, train: list[str], test: list[str], expected: str
) -> None:
    raw = tmp_path / "other_raw"
    write_dataset(raw, 1, ["n1", "n2"], ["n3"])
    write_dataset(raw, 2, ["s1"], ["s2", "s3"])
    write_dataset(raw, 3, train, test)
    with pytest.raises(ComparisonError, match=expected):
        sites_of_test_cases(staged(jobs, "plain", "central"), raw)


def test_a_test_case_at_two_sites_cannot_be_given_to_one(jobs: Path, tmp_path: Path) -> None:
    raw = tmp_path / "other_raw"
    for dataset_id, train in ((1, ["n1"]), (2, ["s1"])):
        write_dataset(raw, dataset_id, train, ["same"])
    with pytest.raises(ComparisonError, match=r"test case same is at sites 'north' and 'south'"):
        sites_of_test_cases(staged(jobs, "plain", "central"), raw)


def test_pooled_labels_must_be_the_sites_labels(jobs: Path, tmp_path: Path) -> None:
    raw = tmp_path / "other_raw"
    write_dataset(raw, 1, ["n1", "n2"], ["n3"])
    write_dataset(raw, 2, ["s1"], ["s2", "s3"], labels={"background": 0, "y": 1})
    write_dataset(raw, 3, ["n1", "n2", "s1"], ["n3", "s2", "s3"])
    with pytest.raises(ComparisonError, match="other labels or another task than site 'south'"):
        sites_of_test_cases(staged(jobs, "plain", "central"), raw)


def test_data_sets_that_are_not_there_are_asked_for(
    jobs: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("nnUNet_raw", raising=False)
    with pytest.raises(ComparisonError, match="nnUNet_raw is not set"):
        make_data(staged(jobs, "plain"), tmp_path / "own")


def test_without_any_test_case_there_is_nothing_to_compare(
    jobs: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    raw = tmp_path / "untested"
    for dataset_id in (1, 2):
        write_dataset(raw, dataset_id, ["c"], [])
        for folder in ("imagesTs", "labelsTs"):
            (raw / f"Dataset{dataset_id:03d}_X" / folder).rmdir()
    monkeypatch.setenv("nnUNet_raw", str(raw))
    with pytest.raises(ComparisonError, match=r"no site of \['north', 'south'\] has test cases"):
        make_data(staged(jobs, "plain"), tmp_path / "own")


def test_sites_scored_by_other_regions_are_refused_by_name(jobs: Path) -> None:
    methods = [Method("a", "plain"), Method("b", "adapters", (("south.score_regions", {"x": [1]}),))]
    with pytest.raises(ComparisonError, match=r"south.score_regions is {} there and {'x': \[1\]} here"):
        stage_methods(jobs, methods, Frame(), jobs.parent / "staged")


def test_settings_that_one_site_alone_has_are_listed_for_it(jobs: Path) -> None:
    (job,) = staged(jobs, "plain", frame=Frame((("south.score_regions", {"x": [1]}),)))
    readable = readable_settings(job)
    assert {key: value for key, value in readable.items() if "score_regions" in key} == {"south.score_regions.x": [1]}
