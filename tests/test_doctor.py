"""The checks before a job: a sound site passes, each fault is found, and the forecast is what the job then needs."""

import dataclasses
import json
import shutil
import socket
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nibabel
import numpy as np
import psutil
import pytest
import SimpleITK as sitk
import torch
from torch import nn

from fedcmt.config import OptimizerConfig
from fedcmt.data.phantoms import make_brain_mr
from fedcmt.doctor import examine as examine_module
from fedcmt.doctor import machine
from fedcmt.doctor.__main__ import main
from fedcmt.doctor.examine import Report, Request, examine
from fedcmt.doctor.findings import Finding, Level, readable_bytes, readable_seconds, some
from fedcmt.doctor.forecast import (
    Forecast,
    forecast_bytes,
    preprocessed_bytes,
    resampled_voxels,
    tensors_kept,
    validation_batches,
    with_measurement,
)
from fedcmt.doctor.images import (
    CaseFacts,
    across_cases,
    duplicate_findings,
    intensity_findings,
    label_findings,
    name_findings,
    orientation_findings,
    read_facts,
    spacing_findings,
)
from fedcmt.doctor.job import JobSite, SitePlan, plan_alone, read_job
from fedcmt.doctor.machine import DiskNeed, disk_findings, folder_findings, package_findings, parse_server
from fedcmt.doctor.measurement import Measurement
from fedcmt.json_file import read_json
from fedcmt.nnunet.planner import FederatedPlanner
from fedcmt.params import serialized_size

JOBS = Path(__file__).resolve().parents[1] / "jobs"
SMALL = (
    *(("server.planning.base_features", 4), ("server.planning.max_features", 8), ("server.planning.max_stages", 3)),
    *(("server.planning.max_patch_size", [16, 16, 24]), ("server.planning.batch_size", 2), ("server.num_rounds", 10)),
    *(("sites.local_steps", 3), ("sites.val_batches", 2), ("sites.val_every", 4)),
)
CPU = torch.device("cpu")
LPS = (1.0, 0, 0, 0, 1.0, 0, 0, 0, 1.0)


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """nnUNet_raw with one data set of five training cases and one test case."""
    folder = tmp_path_factory.mktemp("raw")
    make_brain_mr(
        folder / "Dataset703_Tiny", num_train=5, num_test=1, seed=3, style="site_a", channels=("T1", "FLAIR"),
        shape_vox=(24, 28, 20),
    )  # fmt: skip
    return folder


@pytest.fixture
def site(raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A site with folders of its own and a copy of the data set, which is returned."""
    shutil.copytree(raw, tmp_path / "raw")
    for name in ("raw", "preprocessed", "results"):
        monkeypatch.setenv(f"nnUNet_{name}", str(tmp_path / name))
    return tmp_path / "raw" / "Dataset703_Tiny"


@pytest.fixture(scope="module")
def planned(raw: Path) -> tuple[JobSite, SitePlan, list[CaseFacts]]:
    asked = read_job(JOBS / "brats_sdl", "client1", SMALL)
    dataset = raw / "Dataset703_Tiny"
    return asked, plan_alone(asked, dataset), read_facts(dataset, read_json(dataset / "dataset.json"))


def case(name: str = "imagesTr/a", **changes: Any) -> CaseFacts:
    values = {
        "case": name,
        "size_vox": (6, 7, 8),
        "spacing_mm": (0.5, 0.5, 2.0),
        "direction": LPS,
        "digests": (name,),
        "lows": (-1000.0,),
        "highs": (900.0,),
        "label_voxels": {0: 90, 1: 10} if name.startswith("imagesTr") else {},
    }
    return CaseFacts(**(values | changes))


def only(findings: list[Finding]) -> Finding:
    (finding,) = findings
    return finding


def of(report: Report, topic: str) -> list[Finding]:
    return [finding for findings in report.sections.values() for finding in findings if finding.topic == topic]


# ---------------------------------------------------------------------------------------------------------------------
# Findings


def test_a_line_says_what_was_found_what_was_expected_and_what_to_do() -> None:
    line = Finding(Level.WARNING, "spacing", "0 mm", "more", "Measure.").line()
    assert line.split(maxsplit=2) == ["warning", "spacing", "0 mm; expected more. Measure."]
    assert Finding(Level.OK, "CPU", "2 cores").line().endswith("CPU                 2 cores")


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (1234, "1.23 kB"), (999_600, "1 MB"), (2.5e12, "2.5 TB")]
)
def test_bytes_have_three_digits(count: float, text: str) -> None:
    assert readable_bytes(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.5, "0.5 s"), (119, "119 s"), (150, "2.5 min"), (7200, "2 h"), (259_200, "3 days")]
)
def test_times_have_a_unit_that_fits(seconds: float, text: str) -> None:
    assert readable_seconds(seconds) == text


def test_long_lists_are_cut_and_counted() -> None:
    assert some(["a", "b"], 2) == "a, b"
    assert some(["a", "b", "c"], 2) == "a, b, ... (3 in all)"


# ---------------------------------------------------------------------------------------------------------------------
# Images


def test_facts_are_those_of_the_files(site: Path) -> None:
    facts = read_facts(site, read_json(site / "dataset.json"))
    assert [f.case.split("/")[0] for f in facts] == ["imagesTr"] * 5 + ["imagesTs"]
    first = facts[0]
    image = sitk.ReadImage(str(site / f"{first.case}_0001.nii.gz"))
    voxels = sitk.GetArrayFromImage(image)
    assert first.size_vox == (24, 28, 20)
    assert first.spacing_mm == pytest.approx(image.GetSpacing())
    assert first.direction == pytest.approx(image.GetDirection())
    assert (first.lows[1], first.highs[1]) == (voxels.min(), voxels.max())
    label = sitk.GetArrayFromImage(sitk.ReadImage(str(site / f"{first.case.replace('images', 'labels')}.nii.gz")))
    assert sum(first.label_voxels.values()) == 24 * 28 * 20
    assert first.label_voxels[3] == int((label == 3).sum())
    assert facts[-1].label_voxels == {}


def test_a_sound_data_set_has_no_warning_of_what_lies_across_cases(site: Path) -> None:
    content = read_json(site / "dataset.json")
    found = across_cases(read_facts(site, content), ("T1", "FLAIR"), content["labels"])
    assert {finding.level for finding in found} == {Level.OK}


@pytest.mark.parametrize("spacing", [(0.5, 0.5, 0.01), (0.5, 0.5, 25.0)])
def test_a_spacing_that_no_scanner_has_is_a_problem(spacing: tuple[float, ...]) -> None:
    finding = only(spacing_findings([case(), case("imagesTr/b", spacing_mm=spacing)]))
    assert finding.level is Level.PROBLEM
    assert "imagesTr/b" in finding.found
    assert "imagesTr/a" not in finding.found


def test_spacings_are_told_as_ranges_where_they_differ() -> None:
    assert (
        only(spacing_findings([case(), case("imagesTr/b", spacing_mm=(0.5, 0.6, 2.0))])).found
        == "0.5 x 0.5 to 0.6 x 2 mm"
    )


def test_a_spacing_of_1_in_every_case_may_be_lost() -> None:
    ones = {"spacing_mm": (1.0, 1.0, 1.0)}
    assert only(spacing_findings([case(**ones), case("imagesTr/b", **ones)])).level is Level.WARNING
    assert only(spacing_findings([case(**ones), case("imagesTr/b")])).level is Level.OK
    assert only(spacing_findings([case(**ones, size_vox=(8, 8, 8))])).level is Level.OK


def test_axes_that_are_not_at_right_angles_are_a_problem() -> None:
    sheared = (1.0, 0.2, 0, 0, 0.98, 0, 0, 0, 1.0)
    finding = only(orientation_findings([case(), case("imagesTr/tilted", direction=sheared)]))
    assert finding.level is Level.PROBLEM
    assert "imagesTr/tilted" in finding.found


def test_cases_of_different_orientation_are_a_warning_that_names_both() -> None:
    mirrored = (-1.0, 0, 0, 0, -1.0, 0, 0, 0, 1.0)
    turned = (0, 0, 1.0, 1.0, 0, 0, 0, -1.0, 0)  # the image's x runs to the back, y down, z to the left
    cases = [case(), case("imagesTr/b", direction=mirrored), case("imagesTr/c", direction=turned)]
    finding = only(orientation_findings(cases))
    assert finding.level is Level.WARNING
    assert finding.found == "LPS in imagesTr/a; PIL in imagesTr/c; RAS in imagesTr/b"


def test_a_slightly_oblique_grid_is_of_its_nearest_orientation() -> None:
    c, s = float(np.cos(0.3)), float(np.sin(0.3))
    assert (
        only(orientation_findings([case(), case("imagesTr/b", direction=(c, -s, 0, s, c, 0, 0, 0, 1.0))])).level == "ok"
    )


def test_ct_in_two_units_is_a_problem() -> None:
    finding = only(intensity_findings([case(), case("imagesTr/b", lows=(0.0,))], ["CT"]))
    assert (finding.level, finding.topic) == (Level.PROBLEM, "CT unit")
    assert "imagesTr/b" in finding.found


def test_ct_without_a_value_below_0_is_a_warning() -> None:
    assert only(intensity_findings([case(lows=(0.0,), highs=(4095.0,))], ["CT"])).level is Level.WARNING


def test_ct_that_reaches_65535_is_a_warning() -> None:
    assert only(intensity_findings([case(highs=(65535.0,))], ["CT"])).level is Level.WARNING


def test_only_ct_has_a_unit() -> None:
    assert intensity_findings([case(lows=(0.0,))], ["T1"]) == []
    assert only(intensity_findings([case(lows=(0.0, -1000.0), highs=(1.0, 900.0))], ["T1", "CT"])).level is Level.OK


def test_a_copy_of_a_case_under_another_name_and_type_is_found(site: Path) -> None:
    original = sorted((site / "imagesTr").glob("*_0000.nii.gz"))[0]
    image = sitk.ReadImage(str(original))
    copy = sorted((site / "imagesTr").glob("*_0000.nii.gz"))[2]
    sitk.WriteImage(sitk.Cast(image, sitk.sitkFloat64), str(copy))
    facts = read_facts(site, read_json(site / "dataset.json"))
    finding = only(duplicate_findings(facts, ("T1", "FLAIR")))
    assert finding.level is Level.PROBLEM
    assert all(path.name.removesuffix("_0000.nii.gz") in finding.found for path in (original, copy))


def test_a_training_image_among_the_test_images_is_a_problem() -> None:
    cases = [case(), case("imagesTs/q", digests=("imagesTr/a",))]
    finding = only(duplicate_findings(cases, ["T1"]))
    assert finding.found == "training cases among the test cases: imagesTr/a = imagesTs/q"


def test_one_image_under_two_channels_is_a_problem() -> None:
    finding = only(duplicate_findings([case(digests=("x", "y", "x"))], ["T1", "T2", "FLAIR"]))
    assert finding.level is Level.PROBLEM
    assert "imagesTr/a (T1 and FLAIR)" in finding.found


def test_images_of_zeros_are_no_duplicates() -> None:
    cases = [case(digests=("x", "")), case("imagesTr/b", digests=("y", ""))]
    assert only(duplicate_findings(cases, ["T1", "T2"])).level is Level.OK


def test_names_that_differ_in_capitals_only_are_a_warning() -> None:
    assert name_findings([case("imagesTr/a"), case("imagesTr/b")]) == []
    assert only(name_findings([case("imagesTr/a"), case("imagesTr/A")])).level is Level.WARNING


def test_labels_that_are_rare_or_lost_are_warnings() -> None:
    labels = {"background": 0, "organ": 1, "lesion": 2, "both": [1, 2]}
    cases = [case(f"imagesTr/{i}", label_voxels={0: 80, 1: 20}) for i in range(5)]
    cases += [case("imagesTr/empty", label_voxels={0: 100}), case("imagesTs/q")]
    summary, rare, empty = label_findings(cases, labels)
    assert "organ in 5 of 6 cases, 17 %; lesion in 0 of 6 cases, 0 %; both in 5 of 6 cases" in summary.found
    assert (rare.level, rare.found) == (Level.WARNING, "'lesion' in 0 training cases")
    assert (empty.level, empty.found) == (Level.WARNING, "no label but background in imagesTr/empty")


# ---------------------------------------------------------------------------------------------------------------------
# Machine


def test_a_package_that_is_missing_or_of_another_version_is_a_problem() -> None:
    assert only(package_findings([f"numpy=={np.__version__}"])).level is Level.OK
    finding = only(package_findings(["numpy==1.0", "no-such-package-of-ours>=2"]))
    assert finding.level is Level.PROBLEM
    assert finding.found == f"numpy {np.__version__} is not ==1.0, no-such-package-of-ours is missing"


def test_the_requirements_are_read_without_comments() -> None:
    lines = machine.required_packages()
    assert any(line.startswith("nnunetv2==") for line in lines)
    assert not any("#" in line for line in lines)


def test_an_old_python_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine.python_finding().level is Level.OK
    monkeypatch.setattr(machine, "sys", SimpleNamespace(version_info=(3, 9, 1)))
    assert machine.python_finding().found == "3.9.1"
    assert machine.python_finding().level is Level.PROBLEM


def test_a_single_core_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda pid: {0}, raising=False)
    assert machine.cpu_finding().level is Level.WARNING
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda pid: {0, 3}, raising=False)
    assert machine.cpu_finding().found == "2 cores"


def test_too_little_memory_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    assert only(machine.memory_findings(1001)).level is Level.PROBLEM
    assert only(machine.memory_findings(1000)).level is Level.OK
    assert only(machine.memory_findings(None)).level is Level.OK


def test_a_missing_gpu_is_a_problem_only_where_the_site_wants_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert only(machine.gpu_findings("auto", None)).level is Level.WARNING
    assert only(machine.gpu_findings("cuda", None)).level is Level.PROBLEM
    assert only(machine.gpu_findings("cpu", None)).level is Level.OK


def test_a_gpu_with_too_little_memory_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (5_000, 8_000))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "G")
    name, memory = machine.gpu_findings("auto", 6_000)
    assert name.found == "G, 8 kB"
    assert (memory.level, memory.topic) == (Level.PROBLEM, "GPU memory")
    assert machine.gpu_findings("auto", 4_000)[1].level is Level.OK


DiskUsage = namedtuple("DiskUsage", "total used free")


@pytest.mark.parametrize(
    ("free_gb", "level"), [(0.4, Level.PROBLEM), (2.9, Level.PROBLEM), (3.1, Level.WARNING), (6.1, Level.OK)]
)
def test_what_all_folders_of_a_disk_need_must_be_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free_gb: float, level: Level
) -> None:
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: DiskUsage(0, 0, int(free_gb * 1e9)))
    needs = [DiskNeed("one", tmp_path / "not" / "yet", int(1e9)), DiskNeed("two", tmp_path, int(2e9))]
    finding = only(disk_findings(needs))
    assert finding.level is level
    assert "one, two" in finding.found


def test_unset_folders_are_counted_in_the_workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("nnUNet_raw", str(tmp_path / "raw"))
    for name in ("nnUNet_preprocessed", "nnUNet_results"):
        monkeypatch.delenv(name, raising=False)
    needs = machine.workspace_needs(tmp_path / "ws", {"nnUNet_preprocessed": 7})
    assert {need.what: (need.folder.name, need.needed_bytes) for need in needs} == {
        "nnUNet_raw": ("raw", 0),
        "nnUNet_preprocessed": ("ws", 7),
        "nnUNet_results": ("ws", 0),
        "workspace": ("ws", 0),
    }


def test_variables_that_are_not_set_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in machine.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    levels = {finding.topic: finding.level for finding in folder_findings(None, None)}
    assert levels == {
        "nnUNet_raw": Level.PROBLEM,
        "nnUNet_preprocessed": Level.WARNING,
        "nnUNet_results": Level.WARNING,
    }


def test_a_raw_folder_that_is_not_there_is_a_problem(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert {finding.level for finding in folder_findings(None, site)} == {Level.OK}
    monkeypatch.setenv("nnUNet_raw", str(site / "nowhere"))
    assert folder_findings(None, None)[0].level is Level.PROBLEM


def test_a_folder_that_cannot_be_written_is_a_problem(site: Path) -> None:
    # A file where a folder should be stops everybody, root too.
    blocked = site.parents[1] / "file"
    blocked.touch()
    assert folder_findings(blocked / "workspace", None)[-1].level is Level.PROBLEM
    assert folder_findings(site.parents[1] / "free", None)[-1].level is Level.OK


def test_another_data_set_of_the_same_id_in_nnunet_s_folders_is_a_warning(site: Path) -> None:
    (site.parents[1] / "preprocessed" / "Dataset703_Older").mkdir(parents=True)
    (site.parents[1] / "preprocessed" / "Dataset703_Tiny").mkdir()
    finding = folder_findings(None, site)[-1]
    assert (finding.level, finding.found) == (Level.WARNING, "nnUNet_preprocessed holds Dataset703_Older")


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    """A port that answers until it is closed."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


def test_a_server_that_listens_is_reached_and_one_that_does_not_is_a_problem(listener: socket.socket) -> None:
    host, port = listener.getsockname()
    assert machine.server_finding(host, port).level is Level.OK
    listener.close()
    finding = machine.server_finding(host, port, timeout_seconds=1)
    assert finding.level is Level.PROBLEM
    assert f"{host}:{port} is not reached" in finding.found


def test_a_server_is_named_by_host_and_port() -> None:
    assert parse_server("fl.example.org:8002") == ("fl.example.org", 8002)
    assert parse_server("[::1]:8002") == ("::1", 8002)
    for text in ("fl.example.org", ":8002", "host:0", "host:65536", "host:x"):
        with pytest.raises(ValueError, match="is not HOST:PORT"):
            parse_server(text)


# ---------------------------------------------------------------------------------------------------------------------
# Forecast


def test_bytes_on_the_wire_are_those_of_the_server_s_own_model(
    planned: tuple[JobSite, SitePlan, list[CaseFacts]],
) -> None:
    asked, plan, facts = planned
    forecast = forecast_bytes(asked, plan, facts, CPU)
    sent = plan.fingerprint.to_dict()
    planner = FederatedPlanner(asked.job.server.planning, 0)
    initial = planner.initial(
        planner.plan({"client1": sent}, {}), {"client1": sent}, {"client1": "MR"}, asked.algorithm.scopes
    )
    assert forecast.sent_bytes == forecast.received_bytes == serialized_size(initial)[1]
    assert forecast.total_sent_bytes == 10 * forecast.sent_bytes
    assert forecast.total_received_bytes == 10 * forecast.sent_bytes
    assert sum(forecast.parameters_by_scope.values()) == forecast.parameters
    assert forecast.parameters_by_scope["personal"] > 0
    assert forecast.batch_shape == (2, 2, *plan.chosen["patch_size"])


def test_an_algorithm_whose_product_is_received_sends_it_once_more(
    planned: tuple[JobSite, SitePlan, list[CaseFacts]],
) -> None:
    asked, plan, facts = planned
    averaged = dataclasses.replace(asked, algorithm=read_job(JOBS / "fedavg_brats", "client1").algorithm)
    forecast = forecast_bytes(averaged, plan, facts, CPU)
    assert forecast.total_sent_bytes == 10 * forecast.sent_bytes
    assert forecast.total_received_bytes == 11 * forecast.sent_bytes


def test_a_job_that_shares_nothing_sends_nothing(planned: tuple[JobSite, SitePlan, list[CaseFacts]]) -> None:
    asked, plan, facts = planned
    alone = dataclasses.replace(asked, algorithm=read_job(JOBS / "standalone_brats", "client1").algorithm)
    forecast = forecast_bytes(alone, plan, facts, CPU)
    assert (forecast.sent_bytes, forecast.total_received_bytes) == (0, 0)


def test_the_state_holds_two_models_and_the_optimiser_s_moments(
    planned: tuple[JobSite, SitePlan, list[CaseFacts]],
) -> None:
    asked, plan, facts = planned
    adam = forecast_bytes(asked, plan, facts, CPU)
    assert adam.state_bytes == 4 * adam.parameters * 4
    assert adam.results_bytes == 2 * adam.parameters * 4
    plain = dataclasses.replace(asked.config, optimizer=OptimizerConfig(name="SGD"))
    sgd = forecast_bytes(dataclasses.replace(asked, config=plain), plan, facts, CPU)
    assert sgd.state_bytes == 2 * adam.parameters * 4
    assert adam.memory_bytes - sgd.memory_bytes == 2 * adam.parameters * 4


def test_what_a_step_keeps_is_counted_without_the_parameters() -> None:
    with torch.device("meta"):
        network = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 4))
        kept, outputs = tensors_kept(network, torch.empty(2, 3))
    # The input, and the ReLU's output, which ReLU and second layer keep once; that layer's weight is a parameter.
    assert sorted(kept) == [2 * 3 * 4, 2 * 5 * 4]
    assert outputs == 2 * 4 * 4


def test_more_patches_per_step_take_more_memory(planned: tuple[JobSite, SitePlan, list[CaseFacts]]) -> None:
    asked, plan, facts = planned
    larger = {**plan.chosen, "batch_size": 4}
    plans = {**plan.plans, "configurations": {plan.configuration: larger}}
    more = forecast_bytes(asked, dataclasses.replace(plan, plans=plans), facts, CPU)
    assert more.memory_bytes > forecast_bytes(asked, plan, facts, CPU).memory_bytes


def plan_of(spacing: list[float], transpose: list[int]) -> SitePlan:
    """A plan of two channels that says nothing but how to resample."""
    plans = {"transpose_forward": transpose, "configurations": {"c": {"spacing": spacing}}}
    return SitePlan(Path(), {"channel_names": {"0": "T1", "1": "T2"}}, None, plans, "c", None)  # type: ignore[arg-type]


def test_cases_are_counted_on_the_plans_spacing_and_axes() -> None:
    # Arrays are (z, y, x): 8 x 7 x 6 voxels of 2 x 0.5 x 0.5 mm.
    assert resampled_voxels(plan_of([1.0, 0.5, 0.25], [0, 1, 2]), case()) == 16 * 7 * 12
    # Planned as (x, z, y).
    assert resampled_voxels(plan_of([0.25, 1.0, 0.5], [2, 0, 1]), case()) == 12 * 16 * 7
    # 2D keeps the 6 slices along x as they are.
    assert resampled_voxels(plan_of([1.0, 0.25], [2, 0, 1]), case()) == 6 * 16 * 14


def test_preprocessed_cases_are_two_float_images_and_a_label_each() -> None:
    plan = plan_of([2.0, 0.5, 0.5], [0, 1, 2])
    assert preprocessed_bytes(plan, [case(), case("imagesTs/q")]) == 8 * 7 * 6 * (2 * 4 + 1)


def test_validations_are_counted_in_the_rounds_that_have_one(
    planned: tuple[JobSite, SitePlan, list[CaseFacts]],
) -> None:
    # Of 10 rounds, 0, 4 and 8 and the last; twice in each, 2 batches.
    assert validation_batches(planned[0]) == 4 * 2 * 2


def measured_on(case_id: str, device: str) -> Measurement:
    return Measurement(
        case=case_id,
        device=device,
        threads=1,
        preprocess_seconds=7.0,
        preprocessed_bytes=1000,
        step_seconds=2.0,
        loading_seconds=0.5,
        validation_seconds=0.25,
        memory_bytes=10**12,
    )


@pytest.mark.parametrize(("device", "step"), [("cpu", 2.0), ("cuda", 1.5)])
def test_time_is_of_steps_validations_and_preprocessing(
    planned: tuple[JobSite, SitePlan, list[CaseFacts]], device: str, step: float
) -> None:
    asked, plan, facts = planned
    forecast = forecast_bytes(asked, plan, facts, CPU)
    measured = measured_on(facts[1].case.split("/")[1], device)
    whole = with_measurement(forecast, measured, asked, plan, facts)
    rounds = 10 * 3 * step + 16 * 0.25
    assert whole.seconds_per_round == pytest.approx(rounds / 10)
    assert whole.seconds == pytest.approx(rounds + 5 * 7)  # five cases of one size
    assert whole.preprocessed_bytes == 5 * 1000
    assert whole.memory_bytes == 10**12
    assert whole.disk_needs()["nnUNet_preprocessed"] == 5 * 1000


def request(**changes: Any) -> Request:
    return Request(**({"dataset_id": 703, "job": JOBS / "brats_sdl", "site": "client1", "overrides": SMALL} | changes))


def test_a_sound_site_is_measured_and_nothing_is_left_behind(site: Path) -> None:
    before = torch.get_rng_state()
    report = examine(request(workspace=site.parents[1] / "ws"))
    assert report.count(Level.PROBLEM) == 0
    assert isinstance(report.forecast, Forecast)
    measured = report.forecast.measurement
    assert measured is not None
    assert measured.step_seconds > 0
    assert measured.memory_bytes > 0
    assert 0 < report.forecast.preprocessed_bytes < 5 * 24 * 28 * 20 * 9 * 2
    assert sorted(path.name for path in site.parents[1].iterdir()) == ["raw"]
    assert torch.equal(torch.get_rng_state(), before)
    assert set(report.sections) == {"Machine", "Job", "Folders", "Data set", "Forecast"}
    json.dumps(report.to_dict())


def test_a_quick_forecast_has_no_time(site: Path) -> None:
    report = examine(request(quick=True))
    assert report.forecast is not None
    assert report.forecast.seconds is None
    assert only(of(report, "time")).found == "not measured"


def test_a_step_is_not_tried_where_it_would_not_fit(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=10**6))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(examine_module, "measure", lambda *args: pytest.fail("a step was tried"))
    report = examine(request())
    assert [finding.level for finding in of(report, "time")] == [Level.WARNING, Level.OK]
    assert only(of(report, "memory")).level is Level.PROBLEM


def test_a_classifier_is_forecast_with_its_own_outputs(site: Path) -> None:
    cases = sorted(path.name.removesuffix("_0000.nii.gz") for path in (site / "imagesTr").glob("*_0000*"))
    tests = [path.name.removesuffix("_0000.nii.gz") for path in (site / "imagesTs").glob("*_0000*")]
    known = {name: index % 2 for index, name in enumerate(cases)} | dict.fromkeys(tests)
    (site / "classes.json").write_text(json.dumps({"classes": ["no", "yes"], "cases": known}))
    overrides = (*SMALL, ("client1.task", "classification"))
    report = examine(request(overrides=overrides))
    assert report.count(Level.PROBLEM) == 0
    assert report.forecast is not None
    assert report.forecast.measurement is not None
    assert only(of(report, "classes")).found.startswith("no 3, yes 2")


def test_a_broken_data_set_has_a_line_per_problem_and_no_forecast(site: Path) -> None:
    first, second, *_ = sorted((site / "imagesTr").glob("*_0000.nii.gz"))
    first.unlink()
    second.write_bytes(b"no image")
    report = examine(request(quick=True))
    found = [finding for finding in of(report, "data set") if finding.level is Level.PROBLEM]
    assert len(found) == 2
    assert first.name in found[0].found + found[1].found
    assert of(report, "data set")[-1].found == "checks across cases left out"
    assert report.forecast is None


def four_axes(path: Path) -> None:
    image = nibabel.load(path)
    nibabel.save(nibabel.Nifti1Image(np.stack([image.get_fdata()] * 2, axis=-1), image.affine), path)


def colours(path: Path) -> None:
    red = np.zeros((24, 28, 20), [("R", "u1"), ("G", "u1"), ("B", "u1")])
    nibabel.save(nibabel.Nifti1Image(red, nibabel.load(path).affine), path)


def no_voxels(path: Path) -> None:
    nibabel.save(nibabel.Nifti1Image(np.zeros((24, 28, 20, 0), np.float32), nibabel.load(path).affine), path)


@pytest.mark.parametrize("spoil", [four_axes, colours, no_voxels])
def test_an_image_of_another_kind_is_named_and_cases_are_not_compared(
    site: Path, spoil: Callable[[Path], None]
) -> None:
    path = sorted((site / "imagesTr").glob("*_0000.nii.gz"))[1]
    spoil(path)
    wrong, left_out = of(examine(request(quick=True)), "data set")
    assert (wrong.level, left_out.level) == (Level.PROBLEM, Level.WARNING)
    assert wrong.found.startswith(f"imagesTr/{path.name} h")
    assert left_out.found == "checks across cases left out"


def test_too_few_cases_are_a_problem_and_are_looked_at_all_the_same(site: Path) -> None:
    name = sorted((site / "labelsTr").iterdir())[0].name
    for path in [site / "labelsTr" / name, *(site / "imagesTr").glob(name.replace(".nii.gz", "_*"))]:
        path.unlink()
    content = read_json(site / "dataset.json")
    (site / "dataset.json").write_text(json.dumps(content | {"numTraining": 4}))
    report = examine(request(quick=True))
    assert "4 training cases" in only(of(report, "data set")).found
    assert only(of(report, "duplicates")).level is Level.OK
    assert report.forecast is None


def test_a_class_without_a_training_case_is_a_problem(site: Path) -> None:
    names = [p.name.removesuffix("_0000.nii.gz") for p in sorted(site.glob("images*/*_0000.nii.gz"))]
    (site / "classes.json").write_text(json.dumps({"classes": ["no", "yes"], "cases": dict.fromkeys(names, 0)}))
    report = examine(request(overrides=(*SMALL, ("client1.task", "classification")), quick=True))
    assert "yes" in only(of(report, "data set")).found
    assert report.count(Level.PROBLEM) == 1


@pytest.mark.parametrize("folder", ["raw", "preprocessed"])
@pytest.mark.parametrize(
    ("split", "changes", "message"),
    [
        ("[{", {}, "not valid JSON"),
        ('[{"train": ["nobody"], "val": []}]', {}, "names 1 cases that imagesTr does not hold: ['nobody']"),
        ('[{"train": ["nobody"], "val": []}]', {"job": None, "overrides": ()}, "names 1 cases"),
        ('[{"train": [], "val": []}]', {"overrides": (*SMALL, ("sites.fold", 1))}, "has 1 folds, fold is 1"),
    ],
)
def test_a_split_that_a_job_refuses_is_a_problem(
    site: Path, folder: str, split: str, changes: dict[str, Any], message: str
) -> None:
    file = site.parents[1] / folder / site.name / "splits_final.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(split)
    report = examine(request(quick=True, **changes))
    assert only(of(report, "data set")).found.startswith(f"{file}: {message}")
    assert report.count(Level.PROBLEM) == 1
    assert report.forecast is None
    whole = (*SMALL, ("sites.fold", "all"))
    assert only(of(examine(request(quick=True, overrides=whole)), "data set")).level is Level.OK


def test_regions_of_labels_that_are_not_there_are_a_problem(site: Path) -> None:
    labels = {"background": 0, "edema": 1, "necrosis": 2, "enhancing": 3}
    content = {key: value for key, value in read_json(site / "dataset.json").items() if key != "regions_class_order"}
    (site / "dataset.json").write_text(json.dumps(content | {"labels": labels}))
    for label, level in ((3, Level.OK), (7, Level.PROBLEM)):
        regions = (*SMALL, ("client1.score_regions", {"core": [1, label]}))
        finding = only(of(examine(request(quick=True, overrides=regions)), "data set"))
        assert finding.level is level
    assert "site 'client1': score_regions: 'core' is [1, 7], but dataset.json has no label of [7]" in finding.found


def test_a_data_set_that_is_not_there_is_a_problem(site: Path) -> None:
    finding = only(of(examine(Request(dataset_id=9)), "data set"))
    assert finding.level is Level.PROBLEM
    assert "Dataset009_" in finding.found


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"job": JOBS / "no_such_job"}, "no meta.json there"),
        ({"site": "nobody"}, r"no site 'nobody'; its sites are \['client1', 'client2'\]"),
        ({"overrides": (("client1.lr", 3),)}, "unknown keys"),
        ({"overrides": (("server.planning.mode", "best"),)}, "planning.mode is 'best'"),
    ],
)
def test_a_job_that_cannot_be_used_is_a_problem_and_the_data_are_checked_all_the_same(
    site: Path, changes: dict[str, Any], message: str
) -> None:
    report = examine(request(**changes))
    finding = only(of(report, "job"))
    assert finding.level is Level.PROBLEM
    with pytest.raises(ValueError, match=message):
        raise ValueError(finding.found)
    assert only(of(report, "data set")).level is Level.OK


def test_data_the_job_does_not_allow_are_a_problem_of_the_forecast(site: Path) -> None:
    report = examine(request(overrides=(*SMALL, ("server.planning.min_cases", 6))))
    assert "5 training cases, planning.min_cases is 6" in only(of(report, "forecast")).found


def test_the_job_s_channels_are_held_against_the_data(site: Path) -> None:
    report = examine(request(overrides=(*SMALL, ("client1.channels", ["FLAIR", "T1"])), quick=True))
    assert any("swapped channel" in finding.found for finding in of(report, "data set"))


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def test_the_exit_code_tells_of_problems(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["-d", "703"]) == 0
    assert "Problems: 0" in capsys.readouterr().out
    assert main(["-d", "4", "--json"]) == 1
    shown = json.loads(capsys.readouterr().out)
    assert shown["problems"] == 1
    assert shown["forecast"] is None


def test_the_text_says_what_the_forecast_rests_on(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = [part for key, value in SMALL for part in ("--set", f"{key}={json.dumps(value)}")]
    main(["-d", "703", "--job", str(JOBS / "brats_sdl"), "--site", "client1", "--quick", *settings])
    assert "  - plans are those of this site alone" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--job", "jobs/brats_sdl"], "--job and --site go together"),
        (["-d", "1", "--set", "server.seed=1"], "--set is of a job"),
        (["-d", "1", "--server", "nowhere"], "is not HOST:PORT"),
    ],
)
def test_options_that_do_not_go_together_are_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert message in capsys.readouterr().err


def test_help_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    assert "python -m fedcmt.doctor -d 1 --job jobs/brats_sdl --site client1" in capsys.readouterr().out
