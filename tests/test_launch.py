"""What the launcher refuses before it makes any data."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from fedcmt.config import ConfigError, JobConfig
from fedcmt.data.checks import DatasetError
from fedcmt.federation import FederationError
from fedcmt.flare.processes import EngineError
from fedcmt.job_folder import Override, find_job, stage
from fedcmt.json_file import read_json, write_json
from fedcmt.launch import (
    LaunchError,
    Run,
    _run_in_flare,
    _see_to_data,
    _set_aside_earlier_run,
    checked,
    export,
    launch,
)
from tests.tiny import DATASET, DATASET_ID

JOBS = Path(__file__).resolve().parents[1] / "jobs"
SMALL = {"kind": "brain_mr", "style": "site_a", "num_train": 5, "num_test": 1, "seed": 1, "shape_vox": [24, 28, 20]}


@pytest.mark.parametrize("job", ["fedavg_brats", "fedper_brats", "brats_sdl"])
def test_plans_of_their_own_need_an_algorithm_that_averages_by_shape(job: str, tmp_path: Path) -> None:
    demo = {"about": "generated", "cohort": {}}
    run = Run(find_job(JOBS, job), tmp_path / "w", "inprocess", [("server.planning.mode", "own")], demo)
    with pytest.raises(ConfigError, match=rf"job '{job}': planning.mode is 'own', .* averages tensors by name alone"):
        launch(run)
    assert not (tmp_path / "w" / "nnUNet_raw").exists()


@pytest.mark.parametrize("asked", [("server.contribution", {"tier": 1}), ("server.cross_site", True)])
def test_scores_of_sites_that_exchange_nothing_are_refused(asked: tuple[str, object], tmp_path: Path) -> None:
    demo = {"about": "generated", "cohort": {}}
    run = Run(find_job(JOBS, "standalone_brats"), tmp_path / "w", "inprocess", [asked], demo)
    with pytest.raises(FederationError, match="Standalone exchanges nothing to score"):
        launch(run)
    assert not (tmp_path / "w" / "nnUNet_raw").exists()


@pytest.mark.parametrize(
    ("job", "setting"),
    [
        ("brats_fedmepd_standalone", ("server.planning.network_options", {})),
        ("brats_fedmepd", ("algorithm.anchors", False)),
    ],
)
def test_a_network_calibrated_by_anchors_that_nobody_brings_is_refused(
    job: str, setting: tuple[str, object], tmp_path: Path
) -> None:
    run = Run(find_job(JOBS, job), tmp_path / "w", "inprocess", [setting], None)
    with pytest.raises(ConfigError, match=r"calibrated by anchors, and (Standalone|FedMEPD) brings none"):
        checked(run)
    checked(replace(run, overrides=[setting, ("server.planning.network_options", {"calibrated": False})]))


OPTIONS = "server.planning.network_options"


@pytest.mark.parametrize(
    ("settings", "ours", "theirs"),
    [
        ([("algorithm.anchors_per_class", 2)], 2, 4),
        ([(f"{OPTIONS}.anchors_per_class", 6)], 4, 6),
        ([("algorithm.anchors_per_class", 2), (f"{OPTIONS}.anchors_per_class", 3)], 2, 3),
    ],
)
def test_anchors_of_another_number_than_the_network_has_are_refused(
    settings: list[Override], ours: int, theirs: int, tmp_path: Path
) -> None:
    demo = {"about": "generated", "cohort": {}}
    words = rf"algorithm.anchors_per_class is {ours} and {OPTIONS}.anchors_per_class {theirs}, expected the same"
    with pytest.raises(ConfigError, match=words):
        launch(Run(find_job(JOBS, "brats_fedmepd"), tmp_path / "w", "inprocess", settings, demo))
    assert not (tmp_path / "w" / "nnUNet_raw").exists()


@pytest.mark.parametrize(
    "settings",
    [
        [("algorithm.anchors_per_class", 2), (f"{OPTIONS}.anchors_per_class", 2)],
        [("algorithm.anchors_per_class", 4)],
        [("algorithm.anchors_per_class", 2), (f"{OPTIONS}.calibrated", False)],
    ],
)
def test_anchors_of_the_network_s_number_or_for_no_network_are_taken(settings: list[Override], tmp_path: Path) -> None:
    checked(Run(find_job(JOBS, "brats_fedmepd"), tmp_path / "w", "inprocess", settings, None))


@pytest.mark.parametrize(
    ("setting", "named"), [(("c1.role", "fusion"), r"\['c1', 'fusion'\]"), (("fusion.role", "site"), r"\[\]")]
)
def test_another_number_of_fusion_sites_than_one_is_refused(setting: Override, named: str, tmp_path: Path) -> None:
    demo = {"about": "generated", "cohort": {}}
    with pytest.raises(ConfigError, match=rf"sites {named} of \['c1', .*'fusion'\] have .*role.* exactly one"):
        launch(Run(find_job(JOBS, "brats_fedmepd_small"), tmp_path / "w", "inprocess", [setting], demo))
    assert not (tmp_path / "w" / "nnUNet_raw").exists()


def test_the_fusion_site_may_be_any_one_site(tmp_path: Path) -> None:
    settings: list[Override] = [("c1.role", "fusion"), ("fusion.role", "site")]
    checked(Run(find_job(JOBS, "brats_fedmepd_small"), tmp_path / "w", "inprocess", settings, None))


def resumable(workspace: Path) -> bytes:
    """A workspace that looks like that of a FedMEPD run after a round; gives its server's state."""
    stage(find_job(JOBS, "brats_fedmepd_small"), workspace / "job")
    (workspace / "server").mkdir()
    (workspace / "server" / "state.safetensors").write_bytes(b"state")
    return (workspace / "job" / "meta.json").read_bytes()


@pytest.mark.parametrize(
    "change", [{"add_sites": (("second", JOBS / "brats_fedmepd_small" / "fusion"),)}, {"remove_sites": ("fusion",)}]
)
def test_a_fusion_site_that_joins_or_leaves_is_refused_and_the_run_stays(change: dict, tmp_path: Path) -> None:
    before = resumable(tmp_path)
    run = Run(find_job(JOBS, "brats_fedmepd_small"), tmp_path, "inprocess", [], None, resume=True, **change)
    with pytest.raises(ConfigError, match=r"role.* exactly one"):
        launch(run)
    assert (tmp_path / "job" / "meta.json").read_bytes() == before
    assert (tmp_path / "server" / "state.safetensors").read_bytes() == b"state"


def test_a_mistake_in_a_newcomer_s_configuration_is_named_by_the_file_that_was_given(tmp_path: Path) -> None:
    resumable(tmp_path / "w")
    write_json(tmp_path / "mine.json", {"dataset_id": 1, "modality": "MR", "colour": "red"})
    job = find_job(JOBS, "brats_fedmepd_small")
    run = Run(job, tmp_path / "w", "inprocess", [], None, resume=True, add_sites=(("c3", tmp_path / "mine.json"),))
    with pytest.raises(ConfigError, match="colour") as refused:
        launch(run)
    assert str(tmp_path / "mine.json") in str(refused.value)
    assert ".job" not in str(refused.value)


def test_another_job_than_the_one_in_the_workspace_is_not_resumed(tmp_path: Path) -> None:
    before = resumable(tmp_path)
    run = Run(find_job(JOBS, "brats_sdl"), tmp_path, "inprocess", [], None, resume=True)
    with pytest.raises(LaunchError, match=r"holds a run of job 'brats_fedmepd_small', not of 'brats_sdl'; resume"):
        launch(run)
    assert (tmp_path / "job" / "meta.json").read_bytes() == before
    assert (tmp_path / "server" / "state.safetensors").read_bytes() == b"state"


def failing(workspace: Path, why: str | None, monkeypatch: pytest.MonkeyPatch) -> str:
    """What a run says whose engine ended with an error, after the server gave its own reason or none."""

    def run_poc(*args: object, **more: object) -> None:
        if why is not None:
            (workspace / "server").mkdir()
            (workspace / "server" / "failure.txt").write_text(why)
        raise EngineError("the job's process at site 'client2' died")

    monkeypatch.setattr("fedcmt.launch.run_poc", run_poc)
    folder = find_job(JOBS, "brats_sdl")
    with pytest.raises((LaunchError, EngineError)) as raised:
        _run_in_flare(Run(folder, workspace, "poc", [], None), JobConfig.from_folder(folder))
    return str(raised.value)


def test_a_server_that_gave_no_reason_leaves_the_word_to_the_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert failing(tmp_path, None, monkeypatch) == "the job's process at site 'client2' died"


def test_only_a_run_that_finished_a_round_is_said_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    resumable(tmp_path)
    said = failing(tmp_path, None, monkeypatch)
    assert said.endswith("'client2' died; --resume goes on after the last round that was finished")


def test_the_server_s_own_reason_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "logs" / "flare.log"
    assert failing(tmp_path, "no answer", monkeypatch) == f"no answer\nAll that was logged is in {log}"


def test_keys_that_a_killed_launcher_left_are_not_set_aside(tmp_path: Path) -> None:
    for folder in ("flare/poc/poc/state", "flare/home", "flare/result", "server"):
        (tmp_path / "job" / folder).mkdir(parents=True)
    _set_aside_earlier_run(tmp_path / "job")
    (moved,) = tmp_path.glob("previous/*/flare")
    assert [path.name for path in moved.iterdir()] == ["result"]


def test_a_job_that_is_to_run_later_is_checked_without_a_trace(tmp_path: Path) -> None:
    demo = {"about": "generated", "cohort": {}}
    run = Run(find_job(JOBS, "hippocampus_central"), tmp_path / "w", "inprocess", [("server.num_rounds", 3)], demo)
    job = checked(run)
    assert (sorted(job.sites), job.server.num_rounds) == (["pooled"], 3)
    with pytest.raises(ConfigError, match="num_rounds is 0"):
        checked(replace(run, overrides=[("server.num_rounds", 0)]))
    assert not (tmp_path / "w").exists()


def test_what_an_earlier_run_spent_on_the_same_cases_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server = tmp_path / "job" / "server"
    server.mkdir(parents=True)
    (server / "privacy.jsonl").write_text('{"delta": 1e-05}\n{"epsilon_after": 3.4712}\n')
    _set_aside_earlier_run(tmp_path / "job")
    assert "It spent epsilon 3.471, which adds to what this run spends" in capsys.readouterr().out
    assert not server.exists()


def test_an_earlier_run_without_privacy_says_nothing_of_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "job" / "server").mkdir(parents=True)
    _set_aside_earlier_run(tmp_path / "job")
    assert "epsilon" not in capsys.readouterr().out


def test_an_exported_job_holds_its_settings_and_nothing_that_is_not_flare_s(tmp_path: Path) -> None:
    overrides: list = [("server.num_rounds", 3), ("client2.dataset_id", 7)]
    export(Run(find_job(JOBS, "brats_sdl"), tmp_path / "w", "simulator", overrides, None), tmp_path / "job")
    assert checked(Run(tmp_path / "job", tmp_path / "w", "simulator", [], None)).server.num_rounds == 3
    assert read_json(tmp_path / "job" / "client2" / "config" / "site.json")["dataset_id"] == 7
    assert sorted(path.name for path in (tmp_path / "job").iterdir()) == ["client1", "client2", "meta.json", "server"]
    assert not (tmp_path / "w").exists()


def test_an_exported_demo_comes_with_its_cohort(tmp_path: Path) -> None:
    demo = {"about": "generated", "cohort": {"Dataset901_DemoBrainA": SMALL}}
    export(Run(find_job(JOBS, "brats_sdl"), tmp_path / "w", "simulator", [], demo), tmp_path / "job")
    assert (tmp_path / "w" / "nnUNet_raw" / "Dataset901_DemoBrainA" / "dataset.json").is_file()


@pytest.fixture
def see_to_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path | None, int], Path]:
    """A job whose second site has a data set of that id, not of the cohort; returns where its sites look for data."""
    raw = tmp_path / "w" / "nnUNet_raw"
    monkeypatch.setenv("nnUNet_raw", str(raw))

    def see(source_raw: Path | None, dataset_id: int) -> Path:
        demo = {"about": "generated", "cohort": {"Dataset901_DemoBrainA": SMALL}}
        settings: list[Override] = [("client1.dataset_id", 901), ("client2.dataset_id", dataset_id)]
        run = Run(find_job(JOBS, "brats_sdl"), tmp_path / "w", "inprocess", settings, demo)
        _see_to_data(run, checked(run), source_raw)
        return raw

    return see


def test_a_site_beside_a_cohort_may_have_data_of_its_own(
    tmp_path: Path, tiny_raw: Path, see_to_data: Callable[[Path | None, int], Path]
) -> None:
    raw = see_to_data(tiny_raw, DATASET_ID)
    assert (raw / DATASET).resolve() == (tiny_raw / DATASET).resolve()
    moved = tmp_path / "elsewhere"
    shutil.copytree(tiny_raw / DATASET, moved / DATASET)
    see_to_data(moved, DATASET_ID)  # nnUNet_raw is another folder now
    assert (raw / DATASET).resolve() == (moved / DATASET).resolve()
    shutil.copytree(tiny_raw / DATASET, moved / "Dataset901_Mine")
    see_to_data(moved, DATASET_ID)
    (first,) = raw.glob("Dataset901_*")
    assert first.name == "Dataset901_DemoBrainA"  # the cohort's own is used, not linked over


def test_a_data_set_neither_of_the_cohort_nor_the_user_s_is_named_with_both_folders(
    tiny_raw: Path, see_to_data: Callable[[Path | None, int], Path]
) -> None:
    said = rf"(?s)site 'client2': .*no folder Dataset702_\*.*holds the job's cohort; nnUNet_raw={tiny_raw} was searched"
    with pytest.raises(DatasetError, match=said):
        see_to_data(tiny_raw, DATASET_ID + 1)


def test_a_job_with_a_mistake_is_not_exported(tmp_path: Path) -> None:
    run = Run(find_job(JOBS, "brats_sdl"), tmp_path / "w", "simulator", [("server.num_rounds", 0)], None)
    with pytest.raises(ConfigError, match="num_rounds is 0") as refused:
        export(run, tmp_path / "job")
    assert str(run.job) in str(refused.value)  # and not a copy that is gone
    assert not (tmp_path / "job").exists()


def test_an_export_replaces_a_job_and_nothing_else(tmp_path: Path) -> None:
    run = Run(find_job(JOBS, "brats_sdl"), tmp_path / "w", "simulator", [], None)
    (tmp_path / "job").mkdir()
    (tmp_path / "job" / "mine.txt").touch()
    with pytest.raises(LaunchError, match=r"--export .*: is there and is no job folder"):
        export(run, tmp_path / "job")
    assert (tmp_path / "job" / "mine.txt").exists()
    export(run, tmp_path / "new")
    export(run, tmp_path / "new")
    assert (tmp_path / "new" / "meta.json").is_file()
