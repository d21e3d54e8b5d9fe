"""Configuration: unknown keys are refused with the known ones, and each bad value is named with what was expected."""

import json
import math
from pathlib import Path

import pytest

from fedcmt.algorithms.fedavg import FedAvg
from fedcmt.config import (
    SERVER_CONFIG,
    ConfigError,
    ContributionConfig,
    JobConfig,
    OptimizerConfig,
    ServerConfig,
    SiteConfig,
    build_algorithm,
    site_apps,
)
from fedcmt.evaluation.regions import REGIONS_EXPECTED
from fedcmt.json_file import JsonFileError

SITE = {"dataset_id": 7, "modality": "MR"}
NUMBER = "a whole number from 1"
BAD_SITE = [
    ("dataset_id", 0, "1 to 999"), ("dataset_id", 1000, "1 to 999"), ("dataset_id", "7", "1 to 999"),
    ("modality", "", "e.g. MR or CT"), ("modality", 3, "e.g. MR or CT"),
    ("task", "classify", "segmentation or classification"),
    ("fold", 5, '0 to 4, or "all"'), ("fold", -1, '0 to 4, or "all"'), ("fold", True, '0 to 4, or "all"'),
    ("local_steps", 0, NUMBER), ("local_steps", 2.0, NUMBER), ("val_every", 0, NUMBER), ("val_batches", "5", NUMBER),
    ("num_processes", 0, NUMBER), ("grad_clip", 0, "above 0"), ("grad_clip", math.nan, "above 0"),
    ("mirroring", 1, "true or false"), ("score_common", None, "true or false"),
    ("num_workers", -1, "null or a whole number from 0"),
    ("role", "server", "site or fusion"), ("loss", "ce", "dice_ce, dice, fedmunet, fedmepd"),
    ("mirror_axes", [3], "null or a list of array axes from 0 to 2"),
    ("mirror_axes", 0, "null or a list of array axes from 0 to 2"),
    ("device", "tpu", "auto, cpu or cuda"), ("channels", "T1", "null or a list of channel names"),
    ("channels", ["T1", 2], "null or a list of channel names"),
    ("score_regions", [[1, 2]], REGIONS_EXPECTED), ("score_regions", {"core": []}, REGIONS_EXPECTED),
    ("score_regions", {"core": [2, 2]}, REGIONS_EXPECTED), ("score_regions", {"core": [0]}, REGIONS_EXPECTED),
]  # fmt: skip
BAD_OPTIMIZER = [
    ("name", "LBFGS", "AdamW, Adam or SGD"), ("lr", 0, "a number above 0"), ("lr", "0.1", "a number above 0"),
    ("weight_decay", -1e-5, ">= 0"), ("momentum", 1.0, "in [0, 1)"), ("momentum", 0.9, "0 for AdamW"),
    ("schedule", "cosine", "constant, poly, exp_poly, round_poly"), ("reset", 1, "true or false"),
]  # fmt: skip
BAD_SERVER = [
    ("num_rounds", 0, NUMBER), ("num_rounds", True, NUMBER), ("num_rounds", 2.5, NUMBER),
    ("planning", ["mode"], "an object"), ("min_sites", 0, "null or >= 1"), ("seed", -1, "a whole number from 0"),
    ("round_timeout", 0, "seconds, from 1"),
    ("setup_timeout", 1.5, "seconds, from 1"),
    ("contribution", 2, "an object"), ("cross_site", 1, "true or false"),
]  # fmt: skip

BAD_CONTRIBUTION = [
    ("tier", 4, "0, 1, 2 or 3"), ("tier", True, "0, 1, 2 or 3"), ("every", 0, NUMBER),
    ("every", 4, "at most num_rounds, 3"), ("between_rounds", -0.1, "in [0, 1)"),
    ("within_permutation", "0", "in [0, 1)"), ("convergence", 0, "in (0, 1)"),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value", "expected"), BAD_SITE)
def test_a_bad_value_of_a_site_names_file_key_value_and_expectation(
    key: str, value: object, expected: str, tmp_path: Path
) -> None:
    file = tmp_path / "site.json"
    file.write_text(json.dumps({**SITE, key: value}))
    with pytest.raises(ConfigError) as caught:
        SiteConfig.from_file(file)
    assert str(caught.value) == f"{file}: {key} is {value!r}, expected {expected}"


@pytest.mark.parametrize(("key", "value", "expected"), BAD_OPTIMIZER)
def test_a_bad_value_of_an_optimiser_is_named_with_its_place(key: str, value: object, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        SiteConfig.from_dict({**SITE, "optimizer": {key: value}}, "site.json")
    assert str(caught.value) == f"site.json: optimizer: {key} is {value!r}, expected {expected}"


@pytest.mark.parametrize(("key", "value", "expected"), BAD_SERVER)
def test_a_bad_value_of_the_server_is_named(key: str, value: object, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ServerConfig.from_dict({"num_rounds": 3, key: value}, "server.json")
    assert str(caught.value) == f"server.json: {key} is {value!r}, expected {expected}"


@pytest.mark.parametrize(("key", "value", "expected"), BAD_CONTRIBUTION)
def test_a_bad_value_of_the_contribution_is_named_with_its_place(key: str, value: object, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ServerConfig.from_dict({"num_rounds": 3, "contribution": {"tier": 1, key: value}}, "server.json")
    assert str(caught.value) == f"server.json: contribution: {key} is {value!r}, expected {expected}"


def test_contributions_are_directions_only_unless_asked_for() -> None:
    assert ServerConfig.from_dict({"num_rounds": 3}, "s").contribution == ContributionConfig(tier=0)
    given = {"tier": 3, "every": 3, "convergence": 0.1}
    assert ServerConfig.from_dict({"num_rounds": 3, "contribution": given}, "s").contribution == ContributionConfig(
        tier=3, every=3, between_rounds=0.01, within_permutation=0.001, convergence=0.1
    )


def test_an_unknown_key_lists_the_known_ones() -> None:
    known = r"known keys: \['lr', 'momentum', 'name', 'reset', 'schedule', 'weight_decay'\]"
    with pytest.raises(ConfigError, match=r"^here: unknown keys \['decay', 'rate'\]; " + known):
        OptimizerConfig.from_dict({"rate": 1, "lr": 0.1, "decay": 2}, "here")


def test_missing_keys_list_the_known_ones() -> None:
    with pytest.raises(
        ConfigError, match=r"^s: missing keys \['dataset_id', 'modality'\]; known keys: .*'local_steps'"
    ):
        SiteConfig.from_dict({"fold": 1}, "s")


def test_values_are_taken_and_the_rest_is_the_default() -> None:
    values = {**SITE, "fold": "all", "optimizer": {"name": "SGD", "momentum": 0.99, "lr": 0.01}, "grad_clip": 12}
    config = SiteConfig.from_dict(values, "s")
    assert config.optimizer == OptimizerConfig("SGD", 0.01, 1e-5, 0.99, "constant")
    assert (config.dataset_id, config.fold, config.grad_clip, config.local_steps) == (7, "all", 12, 250)


def test_regions_are_scored_at_sites_that_segment_only() -> None:
    regions = {"whole_tumor": [1, 2], "core": [2]}
    assert SiteConfig.from_dict({**SITE, "score_regions": regions}, "s").score_regions == regions
    assert SiteConfig.from_dict(SITE, "s").score_regions == {}
    assert SiteConfig.from_dict({**SITE, "task": "classification", "score_regions": {}}, "s").score_regions == {}
    with pytest.raises(ConfigError, match=r"^s: score_regions is .* expected {} at a site that classifies$"):
        SiteConfig.from_dict({**SITE, "task": "classification", "score_regions": regions}, "s")


def test_what_was_read_cannot_be_changed() -> None:
    config = ServerConfig.from_dict({"num_rounds": 3}, "s")
    with pytest.raises(AttributeError):
        config.num_rounds = 4  # type: ignore[misc]


def test_a_job_folder_is_read_as_a_whole(job_folder: Path) -> None:
    job = JobConfig.from_folder(job_folder)
    assert (job.name, job.server.num_rounds, job.server.seed) == ("tiny", 3, 5)
    assert {name: site.dataset_id for name, site in job.sites.items()} == {"north": 11, "south": 12}
    assert isinstance(build_algorithm(job.algorithm), FedAvg)


def edit(file: Path, change: object) -> None:
    values = json.loads(file.read_text())
    change(values)  # type: ignore[operator]
    file.write_text(json.dumps(values))


@pytest.mark.parametrize("halves", [{"path": "fedcmt.algorithms.fedcmt.FedCMT"}, {"args": {"mu": 1}}])
def test_halves_of_an_algorithm_that_differ_are_refused(halves: dict, job_folder: Path) -> None:
    file = job_folder / "south_app/config/config_fed_client.json"
    edit(file, lambda config: config["components"][0].update(halves))
    with pytest.raises(ConfigError, match=r"south_app/config/config_fed_client\.json: algorithm .* differs from"):
        JobConfig.from_folder(job_folder)


def test_a_job_without_sites_is_refused(job_folder: Path) -> None:
    edit(job_folder / "meta.json", lambda meta: meta.update(deploy_map={"server": ["server"]}))
    with pytest.raises(ConfigError, match=r"meta\.json: deploy_map names no site besides the server"):
        JobConfig.from_folder(job_folder)


def test_a_job_with_two_workflows_is_refused(job_folder: Path) -> None:
    edit(job_folder / SERVER_CONFIG, lambda config: config["workflows"].append({}))
    with pytest.raises(ConfigError, match=r"config_fed_server\.json: expected one workflow, found 2"):
        JobConfig.from_folder(job_folder)


def test_a_server_without_the_algorithm_is_refused(job_folder: Path) -> None:
    edit(job_folder / SERVER_CONFIG, lambda config: config["components"].pop())
    with pytest.raises(ConfigError, match=r"config_fed_server\.json: no component with id 'aggregator'"):
        JobConfig.from_folder(job_folder)


@pytest.mark.parametrize("file", ["meta.json", str(SERVER_CONFIG), "north/config/site.json"])
def test_a_file_that_is_not_there_is_named(file: str, job_folder: Path) -> None:
    (job_folder / file).unlink()
    with pytest.raises(JsonFileError, match=rf"{file}: file not found"):
        JobConfig.from_folder(job_folder)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"path": "os.system", "args": {"command": "touch gone"}}, "'os.system' is outside the package fedcmt"),
        ({"path": "fedcmt_evil.X"}, "outside the package fedcmt"),
        ({"path": "fedcmt.algorithms.fedavg.FedAvgg"}, "has no attribute 'FedAvgg'"),
        ({"path": "fedcmt.algorithms.fedgone.X"}, "No module named 'fedcmt.algorithms.fedgone'"),
        (
            {"path": "fedcmt.algorithms.fedavg.FedAvg", "args": {"mu": 1}},
            r"unknown args \['mu'\]; it takes none",
        ),
        ({"path": "fedcmt.randomness.RandomStream", "args": {"seed": 1}}, "is not an Algorithm"),
    ],
)
def test_what_is_no_algorithm_of_ours_is_refused(spec: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_algorithm(spec)


@pytest.mark.parametrize(
    "deploy_map",
    [
        {"../victim": ["north"]},
        {"/tmp/victim": ["north"]},
        {"north": ["../../north"]},
        {"north": ["no/rth"]},
        {"": ["north"]},
        {"north": ["."]},
        {"north": [".."]},
    ],
)
def test_names_that_lead_out_of_the_job_are_refused(deploy_map: dict, tmp_path: Path) -> None:
    (tmp_path / "meta.json").write_text(json.dumps({"name": "j", "deploy_map": deploy_map}))
    with pytest.raises(ConfigError, match=r"deploy_map names \[.*\], expected app folders and sites of letters"):
        site_apps(tmp_path)


@pytest.mark.parametrize("name", ["../../../tmp/evil", "/tmp/evil", "a/b", "..", "", "a b", None, 7])
def test_a_job_s_name_that_leads_out_of_a_site_s_folders_is_refused(name: object, job_folder: Path) -> None:
    edit(job_folder / "meta.json", lambda meta: meta.update(name=name))
    with pytest.raises(ConfigError, match=r"meta\.json: name is .*, expected the job's name, of letters, digits"):
        JobConfig.from_folder(job_folder)


@pytest.mark.parametrize(
    ("deploy_map", "words"),
    [
        ({"server": ["server"], "app": ["a", "b"]}, "share an app folder"),
        ({"server": ["server"], "app": ["@ALL"]}, "share an app folder"),
        ({"server": ["server"]}, "names no site"),
        (None, "expected app folders"),
    ],
)
def test_each_site_needs_an_app_folder_of_its_own(deploy_map: object, words: str, tmp_path: Path) -> None:
    (tmp_path / "meta.json").write_text(json.dumps({"name": "j", "deploy_map": deploy_map}))
    with pytest.raises(ConfigError, match=words):
        site_apps(tmp_path)


@pytest.mark.parametrize("key", ["optimizer", "modality"])
def test_blank_and_null_values_are_named(key: str) -> None:
    values = {"dataset_id": 1, "modality": "MR"} | {key: None if key == "optimizer" else " "}
    with pytest.raises(ConfigError, match=rf"where: {key} is"):
        SiteConfig.from_dict(values, "where")


def test_an_infinite_rate_is_refused() -> None:
    with pytest.raises(ConfigError, match="lr is inf"):
        OptimizerConfig.from_dict({"lr": float("inf")}, "where")


def test_something_else_than_an_algorithm_is_not_called() -> None:
    with pytest.raises(ConfigError, match="not an Algorithm"):
        build_algorithm({"path": "fedcmt.config.ConfigError", "args": {}})


def test_where_a_classifier_s_classes_stand_is_one_of_three() -> None:
    site = {"dataset_id": 3, "modality": "CT", "task": "classification"}
    assert SiteConfig.from_dict(site, "x").classes == "classes.json"
    with pytest.raises(ConfigError, match=r"classes is 'labels', expected classes\.json, classes\.csv, majority"):
        SiteConfig.from_dict(site | {"classes": "labels"}, "x")


@pytest.mark.parametrize(
    ("privacy", "message"),
    [
        (3, "privacy is 3, expected an object"),
        ({"mode": "dp"}, "privacy: mode is 'dp'"),
        ({"modus": "none"}, r"privacy: unknown keys \['modus'\]"),
    ],
)
def test_bad_privacy_terms_are_named_with_their_place(privacy: object, message: str) -> None:
    with pytest.raises(ConfigError, match=f"here: {message}"):
        ServerConfig.from_dict({"num_rounds": 3, "privacy": privacy}, "here")


@pytest.mark.parametrize(
    ("site", "message"),
    [({"task": "classification"}, "south classifies"), ({"num_workers": 2}, "south has num_workers 2")],
)
def test_sites_that_cannot_train_case_by_case_are_refused(site: dict, message: str, job_folder: Path) -> None:
    terms = {"mode": "instance_dp", "noise_multiplier": 1, "expected_batch": 2}
    edit(job_folder / SERVER_CONFIG, lambda config: config["workflows"][0]["args"].update(privacy=terms))
    JobConfig.from_folder(job_folder)
    edit(job_folder / "south_app/config/site.json", lambda config: config.update(site))
    with pytest.raises(ConfigError, match=message):
        JobConfig.from_folder(job_folder)


@pytest.mark.parametrize(
    ("file", "key", "value", "said"),
    [
        ("meta.json", "deploy_map", {"north": "north"}, "deploy_map is .*expected app folders"),
        ("meta.json", "deploy_map", {"north": [["north"]]}, "deploy_map is .*expected app folders"),
        (SERVER_CONFIG, "workflows", 5, "workflows is 5, expected a list of objects"),
        (SERVER_CONFIG, "workflows", ["x"], "workflows is .*expected a list of objects"),
        (SERVER_CONFIG, "workflows", [{"args": [1]}], r"workflow: args is \[1\], expected an object"),
        (SERVER_CONFIG, "components", [None], r"components is \[None\], expected a list of objects"),
        ("north/config/site.json", "optimizer", {"lr": 10**400}, "optimizer: lr is 1000.*expected a number above 0"),
    ],
)
def test_a_value_of_another_form_is_refused_by_file_and_key(
    job_folder: Path, file: str, key: str, value: object, said: str
) -> None:
    edit(job_folder / file, lambda config: config.update({key: value}))
    with pytest.raises(ConfigError, match=rf"{Path(file).name}: {said}"):
        JobConfig.from_folder(job_folder)
