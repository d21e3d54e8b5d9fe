"""A thousand damaged inputs: each ends in an error that names what is damaged or in a sound result, and no good file
changes.

A failure gives the seed and the damage; ``attempt(np.random.default_rng(seed))`` repeats it.
"""

import gzip
import json
import math
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from torch import Tensor

from fedcmt.algorithms.fedavg import FedAvg
from fedcmt.config import SERVER_CONFIG, ConfigError, JobConfig, SiteConfig, build_algorithm
from fedcmt.data.checks import DatasetError, check_dataset, read_dataset_json, read_splits
from fedcmt.doctor.examine import Request, examine
from fedcmt.egress import EgressLogError, read_log
from fedcmt.federation import FederationError
from fedcmt.json_file import JsonFileError, write_json, write_state
from fedcmt.local_settings import LocalSettings
from fedcmt.messages import Message, Task
from fedcmt.nnunet.fingerprint import Fingerprint
from fedcmt.nnunet.planning_options import PlanningOptions
from fedcmt.nnunet.predict import PredictionInputError, check_images, check_model, load_predictor
from fedcmt.params import ParameterError, load_newest, load_tensors, save_tensors
from fedcmt.privacy.accounting import Release
from fedcmt.privacy.egress import EgressLedger
from fedcmt.privacy.ledger import LedgerError, PrivacyLedger
from fedcmt.session import Prepared
from fedcmt.site import Site
from fedcmt.wire import decode, encode
from tests.damage import (
    Rng,
    StillRunning,
    chosen,
    contents,
    ended_in_time,
    restored,
    spoil_entry,
    spoil_json,
    spoiled_bytes,
    spoiled_value,
)
from tests.nnunet.tiny_model import DATASET_JSON, export_tiny, random_parameters, tiny_plans
from tests.test_federation import DirectChannel, run, stored, three_sites

OURS = (
    *(ConfigError, DatasetError, EgressLogError, FederationError, JsonFileError, LedgerError, ParameterError),
    PredictionInputError,
)
IMAGES, HEADERS, DATASET_JSONS, SPLITS, JOBS, SITE_SETTINGS, MODELS = 160, 40, 100, 40, 160, 60, 40
ANSWERS, OTHER_ANSWERS, CODED, FINGERPRINTS = 80, 60, 40, 40
STATES, SERVER_STATES, SITE_FILES, LEDGERS = 60, 30, 40, 50


def test_they_are_a_thousand() -> None:
    inputs = IMAGES + HEADERS + DATASET_JSONS + SPLITS + JOBS + SITE_SETTINGS + MODELS
    messages = ANSWERS + OTHER_ANSWERS + CODED + FINGERPRINTS
    assert inputs + messages + STATES + SERVER_STATES + SITE_FILES + LEDGERS == 1000


def survive(count: int, attempt: Callable[[Rng], None]) -> None:
    """Run an attempt from each seed; one that fails raises AssertionError with what the damage was."""
    failures = []
    for seed in range(count):
        try:
            with ended_in_time():
                attempt(np.random.default_rng(seed))
        except (AssertionError, StillRunning) as error:
            failures.append(f"seed {seed}: {error}")
    assert not failures, "\n".join([f"{len(failures)} of {count}:", *failures])


def ended(damage: object, call: Callable[[], Any], *names: str, errors: tuple[type[Exception], ...] = ()) -> Any:
    """The call's result, or None if it raised an error of ours, or one of ``errors``, that has one of the names."""
    try:
        return call()
    except Exception as error:  # noqa: BLE001 (any other is the failure that is looked for)
        raised = error
    assert isinstance(raised, (*errors, *OURS, OSError)), f"{damage}: {type(raised).__name__}: {raised}"
    assert any(name in str(raised) for name in names), f"{damage}: names none of {names}: {raised}"
    return None


# Images


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two cases of two channels and 60 voxels."""
    folder = tmp_path_factory.mktemp("raw") / "Dataset043_Damaged"
    rng = np.random.default_rng(0)
    for part in ("imagesTr", "labelsTr"):
        (folder / part).mkdir(parents=True)
    for case in ("a", "b"):
        for channel in range(2):
            _write(folder / f"imagesTr/{case}_{channel:04d}.nii.gz", rng.normal(size=(5, 4, 3)).astype(np.float32))
        _write(folder / f"labelsTr/{case}.nii.gz", rng.integers(0, 3, (5, 4, 3)).astype(np.uint8))
    labels = {"background": 0, "liver": 1, "kidney": 2}
    channels = {"0": "T1", "1": "FLAIR"}
    write_json(
        folder / "dataset.json",
        {"channel_names": channels, "labels": labels, "numTraining": 2, "file_ending": ".nii.gz"},
    )
    return folder


def _write(path: Path, array: np.ndarray) -> None:
    image = sitk.GetImageFromArray(array)
    image.SetSpacing((1.0, 1.5, 2.0))
    sitk.WriteImage(image, str(path))


def spoil_image(path: Path, rng: Rng) -> str:
    """Damage the compressed file, or its header or voxels and compress them again, or leave them as they are."""
    how, content = rng.random(), path.read_bytes()
    if how < 0.05:
        return spoil_entry(path, rng)
    if how < 0.3:
        what, damaged = spoiled_bytes(content, rng)
    elif how < 0.8:
        whole = gzip.decompress(content)
        what, header = spoiled_bytes(whole[:352], rng)
        what, damaged = f"header {what}", gzip.compress(header + whole[352:], 1)
    elif how < 0.95:
        what, whole = spoiled_bytes(gzip.decompress(content), rng)
        damaged = gzip.compress(whole, 1)
    else:
        what, damaged = "not compressed", gzip.decompress(content)
    path.write_bytes(damaged)
    return f"{path.name}: {what}"


def test_a_damaged_image_is_named_or_harmless(dataset: Path) -> None:
    sound, dataset_json = check_dataset(dataset, num_folds=None), read_dataset_json(dataset)

    def attempt(rng: Rng) -> None:
        path = dataset / chosen(rng, ("imagesTr/a_0000.nii.gz", "imagesTr/b_0001.nii.gz", "labelsTr/a.nii.gz"))
        with restored(path):
            damage = spoil_image(path, rng)
            summary = ended(damage, lambda: check_dataset(dataset, num_folds=None), path.name)
            assert summary in (None, sound), f"{damage}: {summary}"
            if summary is not None:
                image = sitk.ReadImage(str(path))
                grid = (*image.GetSpacing(), *image.GetOrigin(), *image.GetDirection())
                assert all(map(math.isfinite, grid)), f"{damage}: {grid}"
                assert all(1e-4 <= edge <= 1e4 for edge in image.GetSpacing()), f"{damage}: {grid}"
            ended(damage, lambda: check_images(dataset / "imagesTr", dataset_json), path.name.split("_")[0])

    survive(IMAGES, attempt)


def spoil_header(path: Path, rng: Rng) -> str:
    """Write another size or type of voxels into a header, or bytes over its sizes, spacings, scales or directions."""
    whole = bytearray(gzip.decompress(path.read_bytes()))
    if rng.random() < 0.5:
        place = chosen(rng, (*range(40, 50, 2), 70, 70))  # dim[0] to dim[4], datatype
        value = chosen(rng, (2, 8, 32, 64, 128, 512, 1536, 2304) if place == 70 else (-1, 0, 1, 2, 4, 32767))
        whole[place : place + 2] = value.to_bytes(2, "little", signed=True)
        what = f"{value} at {place}"
    else:
        places = rng.integers(*chosen(rng, ((40, 56), (70, 120), (252, 330))), size=int(rng.integers(1, 4)))
        for place in places:
            whole[place] = chosen(rng, (0, 1, 2, 4, 128, 255, int(rng.integers(256))))
        what = f"bytes {[(int(place), whole[place]) for place in places]}"
    path.write_bytes(gzip.compress(bytes(whole), 1))
    return f"{path.name}: header {what}"


def test_the_doctor_reports_on_a_damaged_header(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("nnUNet_raw", str(dataset.parent))

    def attempt(rng: Rng) -> None:
        path = dataset / chosen(rng, ("imagesTr/a_0000.nii.gz", "imagesTr/b_0001.nii.gz", "labelsTr/a.nii.gz"))
        with restored(path):
            damage = spoil_header(path, rng)
            report = ended(damage, lambda: examine(Request(dataset_id=43, quick=True)), path.name)
            assert report is not None, damage
            assert report.sections["Data set"], damage

    survive(HEADERS, attempt)


# JSON files


def test_a_damaged_dataset_json_is_named_or_read(dataset: Path) -> None:
    sound = read_dataset_json(dataset)

    def attempt(rng: Rng) -> None:
        with restored(dataset / "dataset.json"):
            damage = spoil_json(dataset / "dataset.json", rng)
            found = ended(
                damage, lambda: check_dataset(dataset, num_folds=None), "dataset.json", "imagesTr", "labelsTr"
            )
            if found is not None:
                assert len(found.channel_names) == 2, damage
                assert set(found.labels) >= {"background"}, damage
                assert found.num_training == sound["numTraining"], damage

    survive(DATASET_JSONS, attempt)


def test_a_damaged_split_is_refused_by_file(tmp_path: Path) -> None:
    path = tmp_path / "splits_final.json"
    path.write_text(json.dumps([{"train": ["a", "b"], "val": ["c"]}, {"train": ["c", "b"], "val": ["a"]}]))

    def attempt(rng: Rng) -> None:
        with restored(path):
            damage = spoil_json(path, rng)
            folds = ended(damage, lambda: read_splits(path), path.name)
            names = [case for fold in folds or () for part in ("train", "val") for case in fold[part]]
            assert all(isinstance(name, str) for name in names), damage

    survive(SPLITS, attempt)


def test_a_damaged_job_folder_is_refused_by_file_or_key(job_folder: Path) -> None:
    server = json.loads((job_folder / SERVER_CONFIG).read_text())
    planning = {"mode": "own", "max_patch_size": [16, 16, 24], "gpu_memory_gb": 4, "batch_size": 2, "network": "UNet3D"}
    server["workflows"][0]["args"] |= {"planning": {**planning, "network_options": {"norm": "group"}}}
    write_json(job_folder / SERVER_CONFIG, server)
    files = sorted(path for path in job_folder.rglob("*.json") if path.name != "demo.json")

    def opened() -> JobConfig:
        job = JobConfig.from_folder(job_folder)
        PlanningOptions.from_dict(job.server.planning)
        build_algorithm(job.algorithm)
        return job

    def attempt(rng: Rng) -> None:
        path = chosen(rng, files)
        with restored(path):
            damage = spoil_json(path, rng)
            # A wrong app folder in meta.json shows as a file that is not there.
            names = (path.name, "config_fed_client.json: file not found", "planning", "algorithm")
            job = ended(damage, opened, *names, errors=(ValueError,))
            if job is not None:
                assert 1 <= len(job.sites) <= 2, damage
                assert all(math.isfinite(site.optimizer.lr) for site in job.sites.values()), damage

    survive(JOBS, attempt)


def test_damaged_settings_of_a_site_are_refused_by_file(tmp_path: Path) -> None:
    path = tmp_path / "fedcmt_site.json"
    floor = {"modes": ["instance_dp"], "max_epsilon": 8.0, "max_delta": 1e-5, "min_noise_multiplier": 0.5}
    content = {"dataset_id": 12, "device": "cpu", "num_workers": 0, "threads": 2, "privacy_floor": floor}
    write_json(path, {**content, "nnUNet_raw": "/data/raw"})

    def attempt(rng: Rng) -> None:
        with restored(path):
            damage = spoil_json(path, rng)
            ended(damage, lambda: LocalSettings.from_file(path), path.name, errors=(ValueError, TypeError))

    survive(SITE_SETTINGS, attempt)


def test_a_damaged_model_folder_is_refused_by_file(tmp_path: Path) -> None:
    model = export_tiny(tmp_path / "model", random_parameters(3))

    def attempt(rng: Rng) -> None:
        path = model / chosen(rng, ("plans.json", "dataset.json"))
        with restored(path):
            damage = spoil_json(path, rng)
            ended(damage, lambda: _loaded(model), path.name, str(model))

    survive(MODELS, attempt)


def _loaded(model: Path) -> None:
    check_model(model, "checkpoint_final.pth")
    load_predictor(model, "checkpoint_final.pth", device=torch.device("cpu"), mirroring=False)


# Messages


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize("task", [Task.TRAIN, Task.FINGERPRINT, Task.PREPARE, Task.FINISH])
def test_a_damaged_answer_is_its_site_s_failure_and_costs_the_model_nothing(tmp_path: Path, task: Task) -> None:
    """Outside of rounds every site is needed: the job then ends with the site's name."""

    def attempt(rng: Rng) -> None:
        told: list[str] = []

        def tamper(answer: Message) -> Message:
            what, damaged = spoiled_answer(answer, rng)
            told.append(what)
            return damaged

        channel = DirectChannel(three_sites(), {(task, "b", 0 if task is Task.TRAIN else None): tamper})
        done = ended(told, lambda: run(tmp_path, channel, min_sites=2), "'b'")
        assert done or task in (Task.FINGERPRINT, Task.PREPARE), told
        if done:
            assert all(bool(tensor.isfinite().all()) for tensor in stored(tmp_path).values()), told

    survive(ANSWERS if task is Task.TRAIN else OTHER_ANSWERS // 3, attempt)


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_a_damaged_coded_update_is_refused_by_site_or_decoded(dtype: str) -> None:
    coded = encode({"w": torch.randn(3, 2), "b": torch.randn(4)}, dtype, seed=1)

    def attempt(rng: Rng) -> None:
        what, answer = spoiled_answer(Message({"x": 1}, coded), rng)
        found = ended(what, lambda: decode(answer.tensors, dtype, where="update of site 'b'"), "site 'b'")
        assert found is None or found.keys() == {"w", "b"}, what
        assert all(tensor.dtype == torch.float32 for tensor in (found or {}).values()), what

    survive(CODED // 2, attempt)


def spoiled_answer(answer: Message, rng: Rng) -> tuple[str, Message]:
    """Damage an answer's plain values, or its tensors."""
    if rng.random() < 0.4:
        what, meta = spoiled_value(answer.meta, rng)
        return f"meta: {what}", replace(answer, meta=meta)
    name = chosen(rng, answer.tensors or ["extra"])
    if name not in answer.tensors:
        return "a tensor that was not asked for", replace(answer, tensors={name: torch.ones(2)})
    what, wrong = chosen(rng, _wrong_tensors(answer.tensors[name]).items())
    return f"{name} is {what}", replace(answer, tensors={**answer.tensors, name: wrong})


def _wrong_tensors(tensor: Tensor) -> dict[str, Any]:
    tensor = tensor.float().reshape(tensor.shape or (1,))
    with_nan, with_inf = tensor.clone(), tensor.clone()
    with_nan.view(-1)[0], with_inf.view(-1)[-1] = math.nan, math.inf
    return {
        "NaN": with_nan,
        "infinite": with_inf,
        "huge": tensor * 1e30,
        "0-d": torch.tensor(1.0),
        "empty": tensor[:0],
        "longer": torch.cat([tensor, tensor]),
        "one axis more": tensor[None],
        "sparse": tensor.to_sparse(),
        "meta": tensor.to("meta"),
        "quantized": torch._empty_affine_quantized(tensor.shape, scale=0.1, zero_point=0, dtype=torch.qint8),
        "an array": tensor.numpy(),
        "a list": tensor.tolist(),
        "nothing": None,
        "expanded": torch.ones(1).expand(tensor.shape),
        "with a gradient": tensor.clone().requires_grad_(),
        **{str(dtype): tensor.to(dtype) for dtype in (torch.float64, torch.float16, torch.bfloat16, torch.int64)},
        **{str(dtype): tensor.to(dtype) for dtype in (torch.bool, torch.complex64, torch.uint8)},
    }


def test_a_damaged_fingerprint_is_refused_by_field() -> None:
    sound = _fingerprint()
    assert Fingerprint.from_dict(sound).num_cases == 6

    def attempt(rng: Rng) -> None:
        damage, content = spoiled_value(sound, rng)
        found = ended(
            damage,
            lambda: Fingerprint.from_dict(content),
            "fingerprint",
            "intensities[0]",
            "bins",
            errors=(ValueError,),
        )
        assert found is None or found.num_cases <= 10**6, damage

    survive(FINGERPRINTS, attempt)


def _fingerprint() -> dict[str, Any]:
    intensities = {"n": 60, "mean": 1.0, "m2": 5.0, "bins": [0, 4], "counts": [20, 40]}
    return {
        "num_cases": 6,
        "channel_names": ["T1"],
        "labels": [["background", 0], ["liver", 1]],
        "regions_class_order": None,
        "file_ending": ".nii.gz",
        "spacing_step_mm": 0.5,
        "shape_step_vox": 16,
        "crop_bins": 12,
        "axes": [[[2, 4, 6]], [[2, 3, 6]], [[3, 2, 6]]],
        "crop": [[5, 6]],
        "intensities": [intensities],
    }


# State on disk


def test_a_damaged_state_is_named_and_the_one_before_it_is_used(tmp_path: Path) -> None:
    newest, before = tmp_path / "last.safetensors", tmp_path / "previous.safetensors"

    def attempt(rng: Rng) -> None:
        for path in tmp_path.iterdir():
            path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
        for round_idx in (0, 1):
            tensors = {"a": torch.full((5, 3), float(round_idx)), "b": torch.zeros(7).half()}
            save_tensors(newest, tensors, {"round": round_idx, "name": "é"}, before=before)
        good = before.read_bytes()
        damage, damaged = spoiled_bytes(newest.read_bytes(), rng)
        newest.write_bytes(damaged)
        ended(damage, lambda: load_tensors(newest), newest.name)
        tensors, meta = load_newest(newest, before, needs=["round"])
        assert set(tensors) == {"a", "b"}, damage
        assert meta["round"] == float(tensors["a"].max()) == float(tensors["a"].min()), damage
        kept = contents(tmp_path)
        assert good in kept.values(), damage
        assert damaged in kept.values(), damage

    survive(STATES, attempt)


def test_a_job_goes_on_from_the_state_before_a_damaged_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run(tmp_path / "whole", DirectChannel(three_sites()), rounds=3)
    run(tmp_path / "job", DirectChannel(three_sites()), rounds=2)
    files = {path: path.read_bytes() for path in (tmp_path / "job").glob("state*.safetensors")}
    assert len(files) == 2

    def attempt(rng: Rng) -> None:
        for path in (tmp_path / "job").glob("state*"):
            path.unlink()
        for path, content in files.items():
            path.write_bytes(content)
        newest = tmp_path / "job" / "state.safetensors"
        damage = spoil_state(newest, rng)
        caplog.clear()
        run(tmp_path / "job", DirectChannel(three_sites()), rounds=3, resume=True)
        assert str(newest) in caplog.text or not newest.exists(), damage
        for name, tensor in stored(tmp_path / "whole").items():
            assert torch.equal(stored(tmp_path / "job")[name], tensor), damage

    survive(SERVER_STATES, attempt)


def spoil_state(path: Path, rng: Rng) -> str:
    what, damaged = spoiled_bytes(path.read_bytes(), rng)
    path.write_bytes(damaged)
    return f"{path.name}: {what}"


def test_a_damaged_file_of_a_site_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here even a value that could be is refused: an unnoticed change would be another run."""
    joined = {"job": "job", "seed": 5, "planning": {}, "privacy": {"mode": "none"}, "num_sites": 2, "federation": "f0"}
    rest = {"configuration": "3d_fullres", "seed": 5, "num_rounds": 4, "schedule_rounds": 4}
    write_state(tmp_path / "joined.json", {**joined, "fingerprint": _fingerprint(), "classes": None})
    write_state(tmp_path / "prepared.json", asdict(Prepared(tiny_plans(), DATASET_JSON, **rest)))
    write_state(tmp_path / "traffic.json", {"sent": 1000, "received": 2000})
    monkeypatch.setenv("nnUNet_raw", str(tmp_path / "no_images"))

    def opened(path: Path) -> None:
        if path.name == "prepared.json":
            Prepared.from_file(path)
            return
        site = Site("north", SiteConfig(12, "MR", device="cpu"), FedAvg(), tmp_path)
        with pytest.raises(DatasetError, match="no_images"):  # once all that is stored has been read
            site.handle(Task.PREPARE, Message({"plans": {}, "num_rounds": 4}))

    def attempt(rng: Rng) -> None:
        path = tmp_path / chosen(rng, ("joined.json", "prepared.json", "traffic.json"))
        before = path.read_bytes()
        with restored(path):
            damage = spoil_json(path, rng)
            said = ended(damage, lambda: (opened(path), "read")[1], path.name)
            gone = path.name == "traffic.json" and not path.exists()
            assert said is None or gone or _same(before, path), damage

    survive(SITE_FILES, attempt)


def _same(before: bytes, path: Path) -> bool:
    return json.loads(before) == json.loads(path.read_bytes())


def test_a_damaged_ledger_is_named_and_stays_as_it_is(tmp_path: Path) -> None:
    privacy, egress = tmp_path / "privacy.jsonl", EgressLedger(tmp_path / "egress.jsonl")
    ledger = PrivacyLedger(privacy, delta=1e-5, max_epsilon=50.0, accountant="rdp")
    for round_idx in range(3):
        ledger.spend("round", [Release(2.0)], round_idx, "whole site")
        egress.release({"a": torch.ones(2)}, {}, allowed=["a"], task="train", round_idx=round_idx)

    def reopened() -> PrivacyLedger:
        return PrivacyLedger(privacy, delta=1e-5, max_epsilon=50.0, accountant="rdp", rounds=range(3))

    sound = reopened().epsilon()

    def attempt(rng: Rng) -> None:
        path = chosen(rng, (privacy, egress.path))
        with restored(path):
            damage = spoil_lines(path, rng)
            if path == privacy:
                found = ended(damage, reopened, path.name)
                assert found is None or found.epsilon() == pytest.approx(sound), damage
            else:
                ended(damage, lambda: read_log(path), path.name)
                left = path.read_bytes()
                egress.release({"a": torch.ones(2)}, {}, allowed=["a"], task="train", round_idx=3)
                assert path.read_bytes().startswith(left), f"{damage}: written over"

    survive(LEDGERS, attempt)


def spoil_lines(path: Path, rng: Rng) -> str:
    """Damage a file of JSON lines: its bytes, or the values of a line."""
    if rng.random() < 0.5:
        return spoil_state(path, rng)
    lines = path.read_text().splitlines()
    number = int(rng.integers(len(lines)))
    what, value = spoiled_value(json.loads(lines[number]), rng)
    lines[number] = json.dumps(value)
    path.write_text("\n".join(lines) + "\n")
    return f"{path.name}: line {number + 1}: {what}"
