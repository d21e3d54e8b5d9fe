"""Boxes round organs: right place, one physical size, and nothing but the image tells the class."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk

from fedcmt.data.checks import DatasetError, check_dataset, read_dataset_json
from fedcmt.data.classes import read_classes
from fedcmt.data.organ_boxes import centred_box, organ_labels
from fedcmt.data.split import make_cuts

SHAPE_XYZ = (10, 12, 9)
SPACING_MM = (1.5, 2.0, 3.0)
ORIGIN_MM = (-11.0, 22.0, 33.0)
DIRECTION = (np.cos(0.3), -np.sin(0.3), 0, np.sin(0.3), np.cos(0.3), 0, 0, 0, 1)
PATIENTS = [f"p{i}" for i in range(8)]
SEGMENTATION, BOXES = "Dataset801_Seg", "Dataset802_Boxes"
COHORT: dict[str, Any] = {
    "cuts": [
        {
            "kind": "deal",
            "source_id": 800,
            "sites": {SEGMENTATION: "segmentation", BOXES: "organ_boxes"},
            "box_mm": [6, 10, 9],  # 4 x 5 x 3 voxels
            "max_training_cases": 9,
            "test_fraction": 0.25,
            "seed": 0,
        }
    ]
}


def volume(array_xyz: np.ndarray, spacing: tuple[float, ...] = SPACING_MM) -> sitk.Image:
    """[X, Y, Z] on an oblique grid."""
    image = sitk.GetImageFromArray(np.ascontiguousarray(array_xyz.T))
    image.SetSpacing(spacing)
    image.SetOrigin(ORIGIN_MM)
    image.SetDirection(DIRECTION)
    return image


def numbered(shape: tuple[int, ...] = SHAPE_XYZ) -> np.ndarray:
    """Every voxel has a value of its own, the least of them 7."""
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape) + 7


def voxels(image: sitk.Image) -> np.ndarray:
    """[X, Y, Z]."""
    return sitk.GetArrayFromImage(image).T


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two-channel images with three organs; p0 to p3 lack the second, and p7 has a spacing of its own."""
    raw = tmp_path_factory.mktemp("source")
    folder = raw / "Dataset800_Source"
    for kind in ("images", "labels"):
        (folder / f"{kind}Tr").mkdir(parents=True)
    for index, patient in enumerate(PATIENTS):
        spacing = (3.0, 2.0, 1.5) if patient == "p7" else SPACING_MM
        label = np.zeros(SHAPE_XYZ, np.uint8)
        label[4:7, 5:8, 3:6] = 3  # centroid 5, 6, 4
        label[0:2, 10:12, 0:1] = 1  # centroid 0.5, 10.5, 0: in a corner
        if index > 3:
            label[2:3, 2:3, 2:3] = 2
        for channel in range(2):
            image = numbered() + 10000 * index + 1000 * channel
            sitk.WriteImage(volume(image, spacing), str(folder / f"imagesTr/{patient}_{channel:04d}.nii.gz"))
        sitk.WriteImage(volume(label, spacing), str(folder / f"labelsTr/{patient}.nii.gz"))
    dataset = {
        "channel_names": {"0": "CT", "1": "T1"},
        "labels": {"background": 0, "Left_Gland": 3, "Cord": 1, "Stem": 2},
        "numTraining": len(PATIENTS),
        "file_ending": ".nii.gz",
    }
    (folder / "dataset.json").write_text(json.dumps(dataset))
    return raw


@pytest.fixture(scope="module")
def boxes(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    raw = tmp_path_factory.mktemp("cut")
    return make_cuts(source, raw, COHORT)[1]


def in_source(source: Path, file: Path) -> sitk.Image:
    """The source's image of a box."""
    patient, channel = file.name[:2], file.name[-len("_0000.nii.gz") :]
    return sitk.ReadImage(str(source / "Dataset800_Source/imagesTr" / (patient + channel)))


# One box


def test_a_box_is_cut_round_its_centre() -> None:
    box = centred_box(volume(numbered()), (5, 6, 4), (4, 5, 3))
    np.testing.assert_array_equal(voxels(box), numbered()[3:7, 4:9, 3:6])


def test_voxels_keep_their_places_in_space() -> None:
    image = volume(numbered())
    box = centred_box(image, (5, 6, 4), (4, 5, 3))
    assert box.GetSpacing() == SPACING_MM
    assert box.GetDirection() == pytest.approx(DIRECTION)
    assert box.GetOrigin() == pytest.approx(image.TransformIndexToPhysicalPoint((3, 4, 3)))


@pytest.mark.parametrize(
    ("centre", "inside"),
    [
        ((0, 11, 0), np.s_[0:4, 7:12, 0:3]),
        ((9, 0, 8), np.s_[6:10, 0:5, 6:9]),
        ((1, 6, 8), np.s_[0:4, 4:9, 6:9]),
    ],
)
def test_a_box_that_would_leave_the_image_is_shifted(centre: tuple[int, ...], inside: Any) -> None:
    image = volume(numbered())
    box = centred_box(image, centre, (4, 5, 3))
    np.testing.assert_array_equal(voxels(box), numbered()[inside])
    first = [axis.start for axis in inside]
    assert box.GetOrigin() == pytest.approx(image.TransformIndexToPhysicalPoint(first))


def test_an_image_smaller_than_the_box_is_padded_with_its_minimum() -> None:
    image = volume(numbered((2, 12, 3)))
    box = voxels(padded := centred_box(image, (0, 1, 2), (4, 5, 6)))
    # x: one voxel at either end, y: shifted to 0, z: one below and two above.
    np.testing.assert_array_equal(box[1:3, :, 1:4], numbered((2, 12, 3))[:, 0:5, :])
    assert np.count_nonzero(box == 7) == 4 * 5 * 6 - 2 * 5 * 3 + 1
    np.testing.assert_allclose(padded.TransformIndexToPhysicalPoint((1, 0, 1)), ORIGIN_MM, atol=1e-5)


# A data set of boxes


def test_there_is_a_box_for_each_organ_a_patient_has(boxes: Path) -> None:
    spec = json.loads((boxes / "split.json").read_text())
    for split, patients in (("Tr", spec["train"]), ("Ts", spec["test"])):
        expected = {f"{p}_{organ}" for p in patients for organ in ("Cord", "Left_Gland")}
        expected |= {f"{p}_Stem" for p in patients if p > "p3"}
        assert {path.name.removesuffix(".nii.gz") for path in (boxes / f"labels{split}").iterdir()} == expected


def test_boxes_hold_the_source_at_the_same_place(source: Path, boxes: Path) -> None:
    files = [path for split in ("Tr", "Ts") for path in (boxes / f"images{split}").iterdir()]
    assert len(files) >= 2 * 2 * 4
    for file in files:
        box = sitk.ReadImage(str(file))
        there = sitk.Resample(in_source(source, file), box, sitk.Transform(), sitk.sitkNearestNeighbor, -1.0)
        np.testing.assert_array_equal(voxels(box), voxels(there), err_msg=file.name)


def test_a_box_is_centred_on_its_organ(source: Path, boxes: Path) -> None:
    file = next(path for path in boxes.glob("imagesTr/*_Left_Gland_0001.nii.gz") if not path.name.startswith("p7"))
    whole = voxels(in_source(source, file))
    np.testing.assert_array_equal(voxels(sitk.ReadImage(str(file))), whole[3:7, 4:9, 3:6])


def test_boxes_have_one_physical_size_at_any_spacing(source: Path, tmp_path: Path) -> None:
    (cut,) = COHORT["cuts"]
    (folder,) = make_cuts(source, tmp_path, {"cuts": [{**cut, "sites": {BOXES: "organ_boxes"}}]})
    sizes = {path.name[:2]: sitk.ReadImage(str(path)).GetSize() for path in folder.glob("images*/*")}
    assert sizes == {**dict.fromkeys(PATIENTS[:7], (4, 5, 3)), "p7": (2, 5, 6)}


def test_boxes_cut_again_are_known_as_the_same(source: Path, boxes: Path, tmp_path: Path) -> None:
    """Preprocessing goes by name, size and time: a second cut must not make a folder anew that a run trains from."""
    again = make_cuts(source, tmp_path, COHORT)[1]
    files = [path.relative_to(boxes) for path in boxes.glob("*T[rs]/*")]
    assert len(files) >= 3 * 2 * 4
    for file in files:
        one, two = (boxes / file).stat(), (again / file).stat()
        assert (one.st_size, one.st_mtime_ns) == (two.st_size, two.st_mtime_ns)


def test_the_label_image_tells_nothing(boxes: Path) -> None:
    assert read_dataset_json(boxes)["labels"] == {"background": 0, "box": 1}
    for path in boxes.glob("labels*/*"):
        np.testing.assert_array_equal(np.unique(voxels(sitk.ReadImage(str(path)))), [1])


def test_classes_are_the_organs_in_the_order_of_their_labels(boxes: Path) -> None:
    classes = read_classes(boxes, read_dataset_json(boxes), "classes.json")
    assert classes.names == ("Cord", "Stem", "Left_Gland")
    assert {case.split("_", 1)[1]: index for case, index in classes.cases.items()} == {
        "Cord": 0,
        "Stem": 1,
        "Left_Gland": 2,
    }


def test_the_boxes_are_a_sound_data_set(boxes: Path) -> None:
    summary = check_dataset(boxes, num_folds=None, channels=("CT", "T1"))
    assert (summary.name, summary.num_training, summary.num_test) == (
        BOXES,
        len(list(boxes.glob("labelsTr/*"))),
        len(list(boxes.glob("labelsTs/*"))),
    )


def test_no_patient_is_at_two_sites_or_both_trained_and_tested_on(boxes: Path) -> None:
    parts = [
        {path.name[:2] for path in (boxes.parent / name / images).iterdir()}
        for name in (SEGMENTATION, BOXES)
        for images in ("imagesTr", "imagesTs")
    ]
    assert sorted(patient for part in parts for patient in part) == PATIENTS


# Running again


def test_running_again_changes_nothing(source: Path, boxes: Path) -> None:
    before = {path: path.lstat().st_mtime_ns for path in boxes.parent.rglob("*")}
    make_cuts(source, boxes.parent, COHORT)
    assert {path: path.lstat().st_mtime_ns for path in boxes.parent.rglob("*")} == before


@pytest.mark.parametrize("change", [{"box_mm": [6, 10, 12]}, {"seed": 1}])
def test_boxes_of_another_cut_are_refused(source: Path, tmp_path: Path, change: dict) -> None:
    cut = {**COHORT["cuts"][0], "sites": {BOXES: "organ_boxes"}}
    make_cuts(source, tmp_path, {"cuts": [cut]})
    with pytest.raises(FileExistsError, match="Dataset802_Boxes is there and was not made by this cut"):
        make_cuts(source, tmp_path, {"cuts": [{**cut, **change}]})


def test_a_cut_that_was_interrupted_is_made_afresh(source: Path, tmp_path: Path) -> None:
    stray = tmp_path / f"{BOXES}.partial" / "imagesTr" / "p0_Cord_0000.nii.gz"
    stray.parent.mkdir(parents=True)
    stray.write_bytes(b"half")
    folder = make_cuts(source, tmp_path, COHORT)[1]
    assert check_dataset(folder, num_folds=None).num_test >= 2
    assert not list(tmp_path.glob("*.partial"))


# Sources that do not do


def test_a_damaged_source_is_refused_before_boxes_hide_it(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "raw" / "Dataset800_Source"
    (folder / "imagesTr").mkdir(parents=True)
    for name in ("dataset.json", "labelsTr"):
        (folder / name).symlink_to(source / folder.name / name)
    for path in (source / folder.name / "imagesTr").iterdir():
        content = path.read_bytes()
        (folder / "imagesTr" / path.name).write_bytes(content[:-40] if path.name == "p2_0001.nii.gz" else content)
    (tmp_path / "cut").mkdir()
    with pytest.raises(DatasetError, match=r"imagesTr/p2_0001\.nii\.gz cannot be read"):
        make_cuts(tmp_path / "raw", tmp_path / "cut", COHORT)
    assert not (tmp_path / "cut" / BOXES).exists()


def test_organs_come_in_the_order_of_their_values() -> None:
    labels = {"background": 0, "b": 2, "a c": 1, "ignore": 3}
    assert list(organ_labels({"labels": labels}).items()) == [("a c", 1), ("b", 2)]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ({"background": 0, "whole": [1, 2], "core": 2}, r"labels \['whole'\] are regions"),
        ({"background": 0, "left/right": 1}, r"labels \['left/right'\] cannot be part of a file name"),
    ],
)
def test_labels_that_are_no_organs_are_refused(labels: dict, message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        organ_labels({"labels": labels})
