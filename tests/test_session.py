"""A site that is asked for a round again, and one that was killed while it stored its state."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import SimpleITK as sitk
import torch
from torch import Tensor

import fedcmt.session
from fedcmt.algorithms.fedcmt import FedCMT
from fedcmt.config import OptimizerConfig, SiteConfig
from fedcmt.evaluation.metrics import EvaluationError
from fedcmt.json_file import read_json, write_json
from fedcmt.messages import Message, Task
from fedcmt.params import Params, load_tensors, save_tensors
from fedcmt.session import RoundGoneError
from fedcmt.site import Site
from tests import tiny
from tests.tiny import DATASET, DATASET_ID, first_payload

PLANNING = {**tiny.PLANNING, "max_stages": 2, "batch_size": 1}
CONFIG = SiteConfig(
    DATASET_ID,
    "MR",
    local_steps=1,
    val_batches=1,
    optimizer=OptimizerConfig("AdamW", lr=1e-2, schedule="poly"),
    device="cpu",
)
INSTANCE_DP = {"mode": "instance_dp", "noise_multiplier": 1.0, "expected_batch": 2, "delta": 1e-3, "noise": "seeded"}


@pytest.fixture
def site(tiny_folders: Path) -> tuple[Callable[..., Site], Params]:
    """Opens the site, anew or as after a kill, and the payload of every round."""
    return prepared(tiny_folders / "site")


def prepared(
    folder: Path, privacy: dict[str, Any] | None = None, config: SiteConfig = CONFIG
) -> tuple[Callable[..., Site], Params]:
    def opened() -> Site:
        return Site("north", config, FedCMT(), folder)

    payload = first_payload(opened(), FedCMT(), planning=PLANNING, privacy=privacy, num_sites=1, num_rounds=4)
    return opened, payload


def trained(site: Site, payload: Params, round_idx: int) -> Message:
    return site.handle(Task.TRAIN, Message({"round": round_idx, "frozen": []}, payload))


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def last(folder: Path) -> tuple[Params, dict]:
    return load_tensors(folder / "site" / "last.safetensors")


@pytest.mark.parametrize("restarted", [True, False])
@pytest.mark.parametrize("times", [1, 3])
def test_a_round_that_is_asked_for_again_is_trained_from_where_it_began(
    site: tuple[Callable[..., Site], Params], tmp_path: Path, times: int, restarted: bool
) -> None:
    opened, payload = site
    running = opened()
    trained(running, payload, 0)
    first, kept = trained(running, payload, 1), last(tmp_path)
    for _ in range(times):
        running = opened() if restarted else running
        again = trained(running, payload, 1)
        assert same(first.tensors, again.tensors)
        assert first.meta["metrics"] == again.meta["metrics"]
        assert same(kept[0], last(tmp_path)[0])
        assert kept[1] == last(tmp_path)[1]
    assert not same(first.tensors, trained(opened(), payload, 2).tensors)


def test_the_first_round_can_be_asked_for_again_too(site: tuple[Callable[..., Site], Params]) -> None:
    opened, payload = site
    assert same(trained(opened(), payload, 0).tensors, trained(opened(), payload, 0).tensors)


def test_a_round_that_the_server_went_on_without_is_no_reason_to_go_back(
    site: tuple[Callable[..., Site], Params], tmp_path: Path
) -> None:
    opened, payload = site
    trained(opened(), payload, 0)
    trained(opened(), payload, 2)
    assert last(tmp_path)[1]["round"] == 2
    assert last(tmp_path)[1]["optimizer"]["steps_done"] == 2
    trained(opened(), payload, 1)  # the server lost round 2 and asks for the one it never got
    assert last(tmp_path)[1]["optimizer"]["steps_done"] == 2


def test_what_lies_further_back_is_refused_and_nothing_changes(
    site: tuple[Callable[..., Site], Params], tmp_path: Path
) -> None:
    opened, payload = site
    for round_idx in range(3):
        trained(opened(), payload, round_idx)
    before = {path.name: path.read_bytes() for path in (tmp_path / "site").glob("*.safetensors")}
    with pytest.raises(RoundGoneError, match=r"asks for round 2, this site has trained round 3 and keeps no state"):
        trained(opened(), payload, 1)
    assert {path.name: path.read_bytes() for path in (tmp_path / "site").glob("*.safetensors")} == before


def test_a_site_keeps_two_states_however_long_it_trains(
    site: tuple[Callable[..., Site], Params], tmp_path: Path
) -> None:
    opened, payload = site
    running = opened()
    for round_idx in range(3):
        trained(running, payload, round_idx)
    names = {path.name for path in (tmp_path / "site").glob("*safetensors*")}
    assert names == {"last.safetensors", "previous.safetensors", "best.safetensors"}
    assert load_tensors(tmp_path / "site" / "previous.safetensors")[1]["round"] == 1


@pytest.mark.parametrize("restarted", [True, False], ids=["killed", "disk full"])
def test_a_state_that_could_not_be_stored_leaves_the_one_before_it(
    site: tuple[Callable[..., Site], Params],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    restarted: bool,
) -> None:
    opened, payload = site
    running = opened()
    trained(running, payload, 0)
    expected = trained(running, payload, 1)
    running = opened()

    def full(path: Path, *values: Any, **options: Any) -> None:
        if path.name == "last.safetensors":
            raise OSError("no space left on device")
        save_tensors(path, *values, **options)

    with monkeypatch.context() as patch:
        patch.setattr(fedcmt.session, "save_tensors", full)
        with pytest.raises(OSError, match="no space left"):
            trained(running, payload, 1)
    assert last(tmp_path)[1]["round"] == 0
    if restarted:  # as a kill leaves it: the former state has given its name away
        (tmp_path / "site" / "last.safetensors").rename(tmp_path / "site" / "previous.safetensors")
        running = opened()
    assert same(trained(running, payload, 1).tensors, expected.tensors)


def test_a_damaged_state_is_named_and_the_site_goes_on_from_the_one_before_it(
    site: tuple[Callable[..., Site], Params], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    opened, payload = site
    trained(opened(), payload, 0)
    expected = trained(opened(), payload, 1)
    path = tmp_path / "site" / "last.safetensors"
    damaged = bytearray(path.read_bytes())
    damaged[-1] ^= 1
    path.write_bytes(damaged)
    assert same(trained(opened(), payload, 1).tensors, expected.tensors)
    assert f"{path}: not a readable state file" in caplog.text
    assert path.with_name("last.safetensors.damaged").read_bytes() == damaged


@pytest.mark.parametrize(("owner", "told"), [("site", "'south', not 'north'"), ("federation", "'f9', not 'f0'")])
def test_another_s_state_is_named_and_the_site_goes_on_from_the_one_before_it(
    owner: str,
    told: str,
    site: tuple[Callable[..., Site], Params],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    opened, payload = site
    trained(opened(), payload, 0)
    expected = trained(opened(), payload, 1)
    path = tmp_path / "site" / "last.safetensors"
    tensors, meta = load_tensors(path)
    save_tensors(path, tensors, {**meta, owner: {"site": "south", "federation": "f9"}[owner]})
    assert same(trained(opened(), payload, 1).tensors, expected.tensors)
    assert f"{path}: not a readable state file (it is of [{owner} {told}]" in caplog.text


def test_a_run_that_starts_anew_leaves_no_state_of_an_earlier_one(
    site: tuple[Callable[..., Site], Params], tmp_path: Path
) -> None:
    opened, payload = site
    trained(opened(), payload, 0)
    prepared(tmp_path / "site")
    assert not (tmp_path / "site" / "previous.safetensors").exists()
    assert last(tmp_path)[1]["round"] == -1


def test_a_round_that_is_trained_again_is_counted_again(
    site: tuple[Callable[..., Site], Params], tmp_path: Path
) -> None:
    """The noise is seeded, so that the second update is the first; with secure noise it would be another release."""
    opened, payload = prepared(tmp_path / "covered", INSTANCE_DP)
    first, again = (trained(opened(), payload, 0) for _ in range(2))
    assert same(first.tensors, again.tensors)
    rows = [json.loads(row) for row in (tmp_path / "covered" / "privacy.jsonl").read_text().splitlines()[1:]]
    assert [row["round"] for row in rows if row["covered"]] == [0, 0]


def test_a_schedule_of_rounds_follows_the_job_s_round_and_not_the_site_s(
    site: tuple[Callable[..., Site], Params], tmp_path: Path
) -> None:
    config = replace(CONFIG, optimizer=replace(CONFIG.optimizer, schedule="round_poly"), local_steps=2)
    opened, payload = prepared(tmp_path / "by_round", config=config)
    seen: list[float] = []
    running = opened()
    running._report = lambda tag, value, _: seen.append(value) if tag == "learning_rate" else None
    for round_idx in (0, 3, 4):
        trained(running, payload, round_idx)
    assert seen == pytest.approx([1e-2, 1e-2 * 0.25**0.9, 1e-2 * 0.25**0.9], abs=5e-9)
    assert read_json(tmp_path / "by_round" / "prepared.json")["schedule_rounds"] == 4


def as_plain_labels(raw: Path) -> None:
    """Make a data set's nested regions the labels that its label maps hold."""
    file = raw / DATASET / "dataset.json"
    content = read_json(file)
    del content["regions_class_order"]
    write_json(file, {**content, "labels": {"background": 0, "oedema": 1, "core": 2, "enhancing": 3}})


@pytest.fixture
def plain_raw(tiny_raw: Path, tiny_folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the data set of all tests here with labels that exclude each other."""
    raw = shutil.copytree(tiny_raw, tmp_path / "plain_raw")
    as_plain_labels(raw)
    monkeypatch.setenv("nnUNet_raw", str(raw))
    return raw


def test_regions_that_a_data_set_has_already_are_refused_before_training(tiny_folders: Path) -> None:
    with pytest.raises(EvaluationError, match=r"site 'north': score_regions is .* dataset\.json has regions already"):
        prepared(tiny_folders / "site", config=replace(CONFIG, score_regions={"whole": [1, 2, 3]}))


def test_a_region_of_a_label_that_a_data_set_lacks_is_refused_before_training(
    plain_raw: Path, tiny_folders: Path
) -> None:
    with pytest.raises(EvaluationError, match=r"site 'north': score_regions: 'whole' .* no label of \[4\]"):
        prepared(tiny_folders / "site", config=replace(CONFIG, score_regions={"whole": [1, 2, 4]}))


def test_whole_cases_are_scored_by_regions_that_the_model_and_its_training_know_nothing_of(
    plain_raw: Path, tiny_folders: Path
) -> None:
    for images in ("images", "labels"):
        shutil.copytree(plain_raw / DATASET / f"{images}Ts", plain_raw / DATASET / f"{images}Common")
    regions = {"whole": [1, 2, 3], "inner": [2, 3]}
    reports, sent = {}, {}
    for name, config in {"labels": CONFIG, "regions": replace(CONFIG, score_regions=regions)}.items():
        opened, payload = prepared(tiny_folders / name, config=config)
        sent[name] = trained(site := opened(), payload, 0)
        reports[name] = site.handle(Task.FINISH, Message({})).meta["report"]
        model = tiny_folders / "results" / reports[name]["model_folder"]
        assert list(read_json(model / "dataset.json")["labels"]) == ["background", "oedema", "core", "enhancing"]
    assert same(sent["labels"].tensors, sent["regions"].tensors)
    assert sent["labels"].meta["metrics"] == sent["regions"].meta["metrics"]
    assert "score_regions" not in reports["labels"]
    assert reports["regions"]["score_regions"] == regions
    for scores in ("test", "validation", "common"):
        assert set(reports["labels"][scores]["dice"]) == {"oedema", "core", "enhancing"}
        dice = reports["regions"][scores]["dice"]
        assert set(dice) == set(reports["regions"][scores]["hd95"]) == {"whole", "inner"}
        assert reports["regions"][scores]["mean_dice"] == pytest.approx(sum(dice.values()) / 2)
    predictions = tiny_folders / "results" / reports["regions"]["model_folder"] / "predictions" / "imagesTs"
    (case,) = [path.name for path in predictions.glob("*.nii.gz")]
    found, true = (
        sitk.GetArrayFromImage(sitk.ReadImage(str(folder / case))) > 0
        for folder in (predictions, plain_raw / DATASET / "labelsTs")
    )
    expected = 2 * (found & true).sum() / (found.sum() + true.sum())
    assert reports["regions"]["test"]["dice"]["whole"] == pytest.approx(expected)
