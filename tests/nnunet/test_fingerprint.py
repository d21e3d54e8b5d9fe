"""Fingerprints: exact to merge, nothing about one case in them, and enough for nnU-Net."""

import dataclasses
import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
from tiny_data import geometries, pool, write_dataset, write_dataset_json

from fedcmt.data.checks import DatasetError, read_dataset_json
from fedcmt.nnunet.fingerprint import (
    MIN_TAIL_VOXELS,
    BinPolicy,
    Fingerprint,
    FingerprintMismatchError,
    Intensities,
    bin_policy,
    bin_to_intensity,
    extract_fingerprint,
    intensity_to_bin,
    merge,
    to_nnunet,
)

FINE = {"spacing_step_mm": 0.001, "shape_step_vox": 1}
CASES = geometries(12, (16, 20, 24), (2.0, 1.0, 0.8))


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("parts")
    bounds = [(0, 5), (5, 7), (7, 12)]
    return [
        write_dataset(root / f"Dataset{i:03d}_P", CASES[a:b], channels=("T1", "T2"), first=a, margin=4)
        for i, (a, b) in enumerate(bounds)
    ]


@pytest.fixture(scope="module")
def prints(parts: list[Path]) -> list[Fingerprint]:
    return [extract_fingerprint(part, **FINE, min_cases=1) for part in parts]


@pytest.fixture(scope="module")
def whole(parts: list[Path]) -> Fingerprint:
    return extract_fingerprint(pool(parts[0].parent / "Dataset100_Pool", parts), **FINE)


def test_merged_parts_are_the_fingerprint_of_the_whole(prints: list[Fingerprint], whole: Fingerprint) -> None:
    merged = merge(prints)
    assert dataclasses.replace(merged, intensities=()) == dataclasses.replace(whole, intensities=())
    for a, b in zip(merged.intensities, whole.intensities, strict=True):
        assert a.n == b.n == 12 * 10_000
        assert a.mean == pytest.approx(b.mean, rel=1e-9)
        assert a.m2 == pytest.approx(b.m2, rel=1e-9)
        assert sum(count for _, count in a.histogram) == a.n
        # Only the tails, which each site closes by itself, may differ.
        low, high = (int(intensity_to_bin(np.array(b.percentile(q)))) for q in (5, 95))
        assert a.histogram != b.histogram
        assert [row for row in a.histogram if low <= row[0] <= high] == [r for r in b.histogram if low <= r[0] <= high]


def test_merge_depends_neither_on_order_nor_on_grouping(prints: list[Fingerprint]) -> None:
    first = merge(prints)
    a, b, c = prints
    for other in [
        *(merge(p) for p in itertools.permutations(prints)),
        merge([a, merge([b, c])]),
        merge([merge([a, b]), c]),
    ]:
        assert dataclasses.replace(other, intensities=()) == dataclasses.replace(first, intensities=())
        for left, right in zip(other.intensities, first.intensities, strict=True):
            assert left.histogram == right.histogram
            assert (left.mean, left.m2) == pytest.approx((right.mean, right.m2), rel=1e-9)


def test_json_round_trip(prints: list[Fingerprint]) -> None:
    assert Fingerprint.from_dict(json.loads(json.dumps(prints[0].to_dict()))) == prints[0]


def test_regions_keep_their_order_through_json(tmp_path: Path) -> None:
    labels: dict[str, int | list[int]] = {"background": 0, "whole": [1, 2], "core": 2}
    folder = write_dataset(tmp_path / "Dataset001_R", CASES[:5], labels=labels)
    content = json.loads((folder / "dataset.json").read_text())
    (folder / "dataset.json").write_text(json.dumps(content | {"regions_class_order": [1, 2]}))
    fingerprint = extract_fingerprint(folder, **FINE)
    read = Fingerprint.from_dict(json.loads(json.dumps(fingerprint.to_dict(), sort_keys=True)))
    assert read.labels == (("background", 0), ("whole", (1, 2)), ("core", 2))
    assert read.regions_class_order == (1, 2)
    reordered = dataclasses.replace(read, labels=(read.labels[0], read.labels[2], read.labels[1]))
    with pytest.raises(FingerprintMismatchError, match="labels"):
        merge([read, reordered])


def _change(content: dict, path: list, value: object) -> dict:
    changed = json.loads(json.dumps(content))
    target = changed
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = value
    return changed


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["num_cases"], -1, "num_cases"),
        (["num_cases"], 10**9, "at most"),
        (["num_cases"], 4, "counts 5 cases"),
        (["num_cases"], True, "num_cases"),
        (["channel_names"], ["T1"], "intensities"),
        (["channel_names", 0], 7, "channel_names"),
        (["labels"], [["a", -1]], "labels"),
        (["labels"], {"a": 1}, "labels"),
        (["file_ending"], "", "file_ending"),
        (["spacing_step_mm"], 0, "spacing_step_mm"),
        (["spacing_step_mm"], math.nan, "spacing_step_mm"),
        (["crop_bins"], 5, "multiple of 4"),
        (["axes"], [], "axes"),
        (["axes", 1, 0, 2], -3, r"axes\[1\]"),
        (["axes", 1, 0, 0], 1.5, r"axes\[1\]"),
        (["axes", 1, 0], [1, 2], r"axes\[1\]"),
        (["crop"], [[5000, 5]], "crop"),
        (["intensities", 0, "mean"], math.inf, r"intensities\[0\]"),
        (["intensities", 0, "m2"], -1.0, "m2"),
        (["intensities", 1, "counts", 0], 0, r"intensities\[1\]"),
        (["intensities", 1, "bins", 0], 10**6, "bins"),
        (["intensities", 1, "min"], 0.0, "unknown keys \\['min'\\]"),
        (["patient"], "x", "unknown keys \\['patient'\\]"),
    ],
)
def test_what_others_send_is_checked(prints: list[Fingerprint], path: list, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Fingerprint.from_dict(_change(prints[0].to_dict(), path, value))


def test_missing_keys_are_named(prints: list[Fingerprint]) -> None:
    content = prints[0].to_dict()
    del content["crop"]
    with pytest.raises(ValueError, match=r"missing keys \['crop'\]"):
        Fingerprint.from_dict(content)


def test_axes_are_not_linked(tmp_path: Path) -> None:
    """Two data sets with the same axes but other combinations of them send the same: no case can be put together."""
    a = [((16 + i, 20 + i, 24 + i), (1.0 + i / 10, 2.0, 0.5)) for i in range(5)]
    b = [((16 + i, 20 + (i + 2) % 5, 24 + (4 - i)), (1.0 + i / 10, 2.0, 0.5)) for i in range(5)]
    first, second = (
        extract_fingerprint(write_dataset(tmp_path / f"Dataset00{i}_X", cases, margin=0), **FINE)
        for i, cases in enumerate((a, b))
    )
    assert first.axes == second.axes
    assert all(list(table) == sorted(table) for table in first.axes)
    assert first.axes[0] == tuple((1000 + 100 * i, 16 + i, 1) for i in range(5))


def test_nothing_names_a_case(prints: list[Fingerprint]) -> None:
    assert "case0" not in json.dumps(prints[0].to_dict())


def test_tables_give_back_spacings_shapes_and_cropping(whole: Fingerprint) -> None:
    content = to_nnunet(whole)
    spacings, shapes = np.array(content["spacings"]), np.array(content["shapes_after_crop"])
    wanted = np.array([s for _, s in CASES]).astype(np.float32).astype(float)
    np.testing.assert_array_equal(np.sort(spacings, 0), np.sort(wanted, 0))
    cropped = np.array([s for s, _ in CASES]) - [4, 0, 0]
    np.testing.assert_array_equal(np.sort(shapes, 0), np.sort(cropped, 0))
    relative = np.median([(s[0] - 4) / s[0] for s, _ in CASES])
    assert content["median_relative_size_after_cropping"] == pytest.approx(relative, abs=0.0005)


def test_intensities_are_numpys_to_bin_width(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    values = np.concatenate([rng.normal(-400, 300, 30_000), rng.lognormal(3, 1, 30_000), np.zeros(500)]).astype(
        np.float32
    )
    bins, counts = np.unique(intensity_to_bin(values), return_counts=True)
    histogram = tuple((int(b), int(c)) for b, c in zip(bins, counts, strict=True))
    sample = Intensities(values.size, float(values.mean()), 0.0, histogram)
    for q in (0.5, 1, 25, 50, 75, 99.5):
        assert sample.percentile(q) == pytest.approx(float(np.percentile(values, q)), rel=0.0011, abs=2e-6)


@pytest.mark.parametrize("value", [0.0, 1e-9, 1e-3, 0.5, 1.0, 37.2, -1024.0, 3071.0, 6.5e4, -3e38])
def test_grid_is_fine_in_every_unit(value: float) -> None:
    centre = bin_to_intensity(int(intensity_to_bin(np.array([value]))[0]))
    assert abs(centre - value) <= 0.00101 * (abs(value) + 1e-3)


def test_histogram_tails_stand_for_enough_voxels(tmp_path: Path) -> None:
    """One voxel of an extreme value per case, each drawn often because the foreground is small, leaves no trace."""
    import SimpleITK as sitk

    folder = write_dataset(tmp_path / "Dataset001_Tail", [((12, 12, 12), (1.0, 1.0, 1.0))] * 5, margin=0)
    for path in sorted((folder / "imagesTr").iterdir()):
        image = sitk.GetArrayFromImage(sitk.ReadImage(str(path)))
        image[6, 6, 6], image[6, 6, 7] = 30_000, -30_000
        sitk.WriteImage(sitk.GetImageFromArray(image), str(path))
    fingerprint = extract_fingerprint(folder, **FINE)
    outer = [bin_to_intensity(fingerprint.intensities[0].histogram[i][0]) for i in (0, -1)]
    assert outer[0] > 0
    assert outer[1] < 151
    assert sum(n for _, n in fingerprint.intensities[0].histogram) == 50_000
    # 216 foreground voxels are drawn 10,000 times, so ten voxels are some 460 draws.
    assert fingerprint.intensities[0].histogram[-1][1] >= MIN_TAIL_VOXELS * 10_000 / 216 - 1


def test_fewer_foreground_voxels_than_a_tail_are_not_sent(tmp_path: Path) -> None:
    import SimpleITK as sitk

    folder = write_dataset(tmp_path / "Dataset001_Few", [((12, 12, 12), (1.0, 1.0, 1.0))] * 5)
    for number, path in enumerate(sorted((folder / "labelsTr").iterdir())):
        label = np.zeros((12, 12, 12), np.uint8)
        label[6, 6, 6] = number < 3
        sitk.WriteImage(sitk.GetImageFromArray(label), str(path))
    with pytest.raises(ValueError, match="about 3 foreground voxels"):
        extract_fingerprint(folder, **FINE)


def test_without_foreground_only_ct_cannot_be_normalised(tmp_path: Path, whole: Fingerprint) -> None:
    empty = (Intensities(0, 0.0, 0.0, ()),)
    mr = dataclasses.replace(whole, channel_names=("T1",), intensities=empty)
    assert to_nnunet(mr)["foreground_intensity_properties_per_channel"] == {"0": {}}
    assert merge([mr, mr]).intensities == empty
    with pytest.raises(ValueError, match="CT normalisation"):
        to_nnunet(dataclasses.replace(mr, channel_names=("ct",)))


def test_too_few_cases_refuse(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "Dataset001_Four", CASES[:4])
    with pytest.raises(ValueError, match=r"4 training cases.*planning\.min_cases is 5"):
        extract_fingerprint(folder, **FINE)
    assert extract_fingerprint(folder, **FINE, min_cases=4).num_cases == 4


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("channel_names", ("T1", "FLAIR")),
        ("labels", (("background", 0), ("a", 1))),
        ("file_ending", ".mha"),
        ("bins", BinPolicy(0.1, 1, 1000)),
    ],
)
def test_merge_names_what_differs(prints: list[Fingerprint], field: str, value: object) -> None:
    other = dataclasses.replace(prints[1], **{field: value})
    with pytest.raises(FingerprintMismatchError, match=rf"{field} differ: left .* right "):
        merge([prints[0], other], ["left", "right"])


def test_label_order_is_free_without_regions(prints: list[Fingerprint]) -> None:
    other = dataclasses.replace(prints[1], labels=prints[1].labels[::-1])
    assert merge([prints[0], other]).num_cases == 7


def test_coarsened_equals_coarsely_extracted(parts: list[Path], prints: list[Fingerprint]) -> None:
    policy = bin_policy("architecture")
    assert (policy.spacing_step_mm, policy.shape_step_vox) == (0.1, 8)
    coarse = extract_fingerprint(parts[0], **dataclasses.asdict(policy))
    assert prints[0].coarsened(policy) == coarse
    assert all(spacing == pytest.approx(round(spacing, 1)) for spacing in coarse.axis(2)[0])
    assert all(shape % 8 == 0 for shape in coarse.axis(2)[1])


def test_single_slices_stay_single(tmp_path: Path) -> None:
    fine, coarse = bin_policy("consensus"), bin_policy("architecture")
    folder = write_dataset(tmp_path / "Dataset001_Flat", [((7, 16, 16), (1.0, 1.0, 1.0))] * 5)
    volumes = extract_fingerprint(folder, **dataclasses.asdict(fine))
    flat = dataclasses.replace(volumes, axes=(((1000, 0, 5),), *volumes.axes[1:]))
    assert flat.coarsened(coarse).axis(0)[1] == [1] * 5
    thin = dataclasses.replace(volumes, axes=(((1000, 2, 5),), *volumes.axes[1:]))
    assert thin.coarsened(coarse).axis(0)[1] == [8] * 5


@pytest.mark.parametrize(("value", "masked"), [(0.7499, True), (0.75, False), (0.7501, False), (1.0, False)])
def test_three_quarters_is_an_edge_of_the_crop_table(whole: Fingerprint, value: float, masked: bool) -> None:
    for bins in (bin_policy("consensus"), bin_policy("architecture")):
        row = (min(bins.crop_bins, math.floor(value * bins.crop_bins)), 1)
        one = dataclasses.replace(whole, num_cases=1, bins=bins, crop=(row,))
        assert (one.median_relative_size_after_cropping() < 0.75) is masked


def test_missing_files_are_named(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "Dataset001_Gap", CASES[:5], channels=("T1", "T2"))
    (folder / "imagesTr" / "case003_0001.nii.gz").unlink()
    (folder / "labelsTr" / "case001.nii.gz").unlink()
    with pytest.raises(
        DatasetError, match=r"(?s)case003_0001\.nii\.gz is missing.*labelsTr/case001\.nii\.gz is missing"
    ):
        extract_fingerprint(folder, **FINE)
    with pytest.raises(DatasetError, match=r"dataset\.json: file not found"):
        extract_fingerprint(tmp_path / "nowhere", **FINE)
    write_dataset_json(tmp_path / "Dataset002_Empty", ["T1"], {"background": 0, "a": 1}, 1)
    with pytest.raises(DatasetError, match="imagesTr does not exist"):
        extract_fingerprint(tmp_path / "Dataset002_Empty", **FINE)


def test_it_stands_for_the_dataset_json_it_was_made_from(prints: list[Fingerprint], parts: list[Path]) -> None:
    for fingerprint, part in zip(prints, parts, strict=True):
        assert fingerprint.dataset_json() == read_dataset_json(part)
    regions = dataclasses.replace(
        prints[0], labels=(("background", 0), ("whole", (1, 2)), ("core", 2)), regions_class_order=(1, 2)
    )
    assert regions.dataset_json()["labels"] == {"background": 0, "whole": [1, 2], "core": 2}
    assert regions.dataset_json()["regions_class_order"] == [1, 2]
