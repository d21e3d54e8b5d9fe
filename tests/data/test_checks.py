"""Checks before training: a sound dataset passes, and each fault is named with its file and a remedy."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from fedcmt.data import checks
from fedcmt.data.checks import (
    Case,
    DatasetError,
    channel_names,
    check_dataset,
    check_splits,
    find_dataset,
    find_splits,
    list_cases,
    list_training_cases,
    read_dataset_json,
    read_splits,
)

SHAPE_ZYX = (8, 7, 6)
SPACING_MM = (1.0, 1.5, 2.0)
ORIGIN_MM = (-11.0, 22.0, 33.0)
FIRST, SECOND, LABEL = "imagesTr/p2_0000.nii.gz", "imagesTr/p2_0001.nii.gz", "labelsTr/p2.nii.gz"
REGIONS = {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "enhancing": 3}


def write(
    path: Path,
    array: np.ndarray,
    spacing: tuple[float, ...] = SPACING_MM,
    origin: tuple[float, ...] = ORIGIN_MM,
    angle: float = 0.3,
) -> None:
    """Write [Z, Y, X] on an oblique grid."""
    image = sitk.GetImageFromArray(array, isVector=False)
    if array.ndim == 3:
        image.SetSpacing(spacing)
        image.SetOrigin(origin)
        image.SetDirection((np.cos(angle), -np.sin(angle), 0, np.sin(angle), np.cos(angle), 0, 0, 0, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(image, str(path))


def voxels(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=SHAPE_ZYX).astype(np.float32)


def label(top: int = 2) -> np.ndarray:
    array = np.zeros(SHAPE_ZYX, np.uint8)
    array[2:5, 2:5, 2:5] = top
    array[2, 2, 2] = 1
    return array


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """Six two-channel training cases and one test case without label."""
    folder = tmp_path / "raw" / "Dataset042_Tiny"
    for i in range(6):
        for channel in range(2):
            write(folder / f"imagesTr/p{i}_{channel:04d}.nii.gz", voxels(10 * i + channel))
        write(folder / f"labelsTr/p{i}.nii.gz", label())
    for channel in range(2):
        write(folder / f"imagesTs/q0_{channel:04d}.nii.gz", voxels(99 + channel))
    content = {
        "channel_names": {"0": "T1", "1": "FLAIR"},
        "labels": {"background": 0, "liver": 1, "kidney": 2},
        "numTraining": 6,
        "file_ending": ".nii.gz",
    }
    (folder / "dataset.json").write_text(json.dumps(content))
    return folder


def edit(folder: Path, **changes: object) -> None:
    path = folder / "dataset.json"
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def problems(folder: Path, **options: object) -> list[str]:
    with pytest.raises(DatasetError) as error:
        check_dataset(folder, **options)  # type: ignore[arg-type]
    first, *lines = str(error.value).splitlines()
    assert "Dataset042_Tiny" in first
    return lines


def only_problem(folder: Path, **options: object) -> str:
    (line,) = problems(folder, **options)
    return line


# A sound dataset


def test_a_sound_dataset_is_summarised(dataset: Path) -> None:
    summary = check_dataset(dataset, num_folds=5, channels=("T1", "FLAIR"))
    assert summary == checks.DatasetSummary(
        folder=dataset,
        name="Dataset042_Tiny",
        dataset_id=42,
        channel_names=("T1", "FLAIR"),
        num_training=6,
        num_test=1,
        labels={"background": 0, "liver": 1, "kidney": 2},
        training_cases=("p0", "p1", "p2", "p3", "p4", "p5"),
        test_cases=("q0",),
    )


def test_regions_ignore_label_and_labelled_test_cases_pass(dataset: Path) -> None:
    edit(dataset, labels=REGIONS | {"ignore": 4}, regions_class_order=[1, 2, 3])
    write(dataset / "labelsTs/q0.nii.gz", label(4))
    assert check_dataset(dataset).labels["core"] == [2, 3]


def test_files_that_are_no_images_are_left_alone(dataset: Path) -> None:
    (dataset / "imagesTr/.DS_Store").write_bytes(b"x")
    (dataset / "imagesTr/README.txt").write_text("x")
    assert check_dataset(dataset).num_training == 6


def test_grids_that_differ_by_rounding_pass(dataset: Path) -> None:
    write(dataset / "labelsTr/p0.nii.gz", label(), (1.0, 1.5, 2.001), (-11.004, 22.0, 33.0), 0.3003)
    assert check_dataset(dataset).num_training == 6


def test_each_file_is_read_once(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Path] = []
    read = checks.read_voxels

    def counted(path: Path) -> np.ndarray:
        seen.append(path)
        return read(path)

    monkeypatch.setattr(checks, "read_voxels", counted)
    check_dataset(dataset)
    assert sorted(seen) == sorted(dataset.glob("*/*.nii.gz"))


def test_cases_are_listed_in_channel_order(dataset: Path) -> None:
    cases = list_cases(dataset, read_dataset_json(dataset))
    assert list(cases) == ["p0", "p1", "p2", "p3", "p4", "p5"]
    assert [path.name for path in cases["p3"]] == ["p3_0000.nii.gz", "p3_0001.nii.gz"]
    assert list(list_cases(dataset, read_dataset_json(dataset), "imagesTs")) == ["q0"]


def test_training_cases_come_with_their_label_and_channels_in_order(dataset: Path) -> None:
    cases = list_training_cases(dataset, read_dataset_json(dataset))
    assert list(cases) == ["p0", "p1", "p2", "p3", "p4", "p5"]
    assert cases["p2"] == Case((dataset / FIRST, dataset / SECOND), dataset / LABEL)


def test_channel_names_come_in_the_order_of_the_files() -> None:
    assert channel_names({"channel_names": {"1": "FLAIR", "0": "T1"}}) == ("T1", "FLAIR")


# The dataset folder


def test_a_dataset_is_found_by_id(dataset: Path) -> None:
    assert find_dataset(dataset.parent, 42) == dataset


def test_a_missing_raw_folder_names_the_variable(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"nowhere does not exist\. Set nnUNet_raw"):
        find_dataset(tmp_path / "nowhere", 42)


def test_an_unknown_id_lists_what_is_there(dataset: Path) -> None:
    with pytest.raises(
        DatasetError, match=r"no folder Dataset004_\*; found \['Dataset042_Tiny'\]\. Check the dataset id"
    ):
        find_dataset(dataset.parent, 4)


def test_an_id_taken_twice_lists_both(dataset: Path) -> None:
    (dataset.parent / "Dataset042_Other").mkdir()
    with pytest.raises(DatasetError, match=r"'Dataset042_Other', 'Dataset042_Tiny'.*Rename or move"):
        find_dataset(dataset.parent, 42)


def test_a_folder_without_dataset_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"is no dataset folder\. Give an existing folder named DatasetXXX_Name"):
        check_dataset(tmp_path)
    with pytest.raises(DatasetError, match="is no dataset folder"):
        check_dataset(tmp_path / "Dataset001_Gone")


# dataset.json


def test_a_missing_dataset_json_is_named(dataset: Path) -> None:
    (dataset / "dataset.json").unlink()
    with pytest.raises(DatasetError, match=r"dataset\.json: file not found\. Write it"):
        read_dataset_json(dataset)


@pytest.mark.parametrize(
    ("text", "message"), [("{", "not valid JSON .*Write it as"), ("[]", "expected a JSON object, found list")]
)
def test_a_broken_dataset_json_is_named(dataset: Path, text: str, message: str) -> None:
    (dataset / "dataset.json").write_text(text)
    with pytest.raises(DatasetError, match=rf"dataset\.json.*{message}"):
        read_dataset_json(dataset)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"channel_names": None}, "key 'channel_names' is missing.*Add it"),
        ({"channel_names": None, "modality": {"0": "T1"}}, "Rename the key 'modality' to it"),
        ({"labels": None}, "key 'labels' is missing"),
        ({"numTraining": None}, "key 'numTraining' is missing"),
        ({"file_ending": None}, "key 'file_ending' is missing"),
        ({"channel_names": ["T1", "FLAIR"]}, r"channel_names is \['T1', 'FLAIR'\]; expected an object"),
        ({"labels": [0, 1]}, r"labels is \[0, 1\]; expected an object"),
        ({"numTraining": "6"}, "numTraining is '6'; expected an integer"),
        ({"numTraining": True}, "numTraining is True; expected an integer"),
        ({"numTraining": 0}, "numTraining is 0. Set it to the number of cases in imagesTr"),
        ({"file_ending": 1}, "file_ending is 1; expected a text"),
        ({"file_ending": ".png"}, r"file_ending is '\.png'; supported are .*Convert"),
        (
            {"channel_names": {"1": "T1", "2": "FLAIR"}},
            r"keys \['1', '2'\]; expected \['0', '1'\].*from 0 without gaps",
        ),
        ({"channel_names": {}}, r"channel_names has the keys \[\]; expected \['0'\]"),
        ({"channel_names": {"0": "T1", "1": 7}}, r"channel_names \{'1': 7\} are no names. Give each channel a text"),
        (
            {"channel_names": {"0": "T1", "1": "FLAIR", "2": "T1"}},
            r"channel_names \{'0': 'T1', '2': 'T1'\} are one name.*Give each channel its own",
        ),
        ({"channel_names": {"0": "T1 ce", "1": "T1CE"}}, r"\{'0': 'T1 ce', '1': 'T1CE'\} are one name, capitals and"),
        ({"labels": {"liver": 1}}, "'background' is missing; expected 0.*Add"),
        ({"labels": {"background": 1, "liver": 0}}, "'background' is 1; expected 0"),
        ({"labels": {"background": 0, "liver": 1, "kidney": 3}}, r"values \[0, 1, 3\]; expected 0, 1, 2.*Renumber"),
        ({"labels": {"background": 0}}, r"values \[0\].*one or more beyond 0"),
        ({"labels": {"0": "background", "1": "liver"}}, "neither integers nor lists.*Write name to value"),
        ({"labels": {"background": 0, "liver": 1.5}}, r"\{'liver': 1.5\} are neither"),
        ({"labels": {"background": 0, "liver": []}}, r"\{'liver': \[\]\} are neither"),
        ({"labels": REGIONS}, "regions_class_order is missing. Add one label value per region"),
        ({"labels": REGIONS, "regions_class_order": [1, 2]}, r"order is \[1, 2\]; expected 3 label values.*Correct"),
        ({"labels": REGIONS, "regions_class_order": [1, 2, 4]}, r"order is \[1, 2, 4\]; expected 3 label values"),
        ({"labels": REGIONS, "regions_class_order": [[1], 2, 3]}, "expected 3 label values"),
        ({"labels": {"background": 0, "ignore": 1, "liver": 2}}, "'ignore' is 1; expected .*the highest. Set it to 3"),
        ({"labels": {"background": 0, "liver": 1, "ignore": [2]}}, r"'ignore' is \[2\]; expected one integer"),
        ({"dataset": {}}, "key 'dataset' lists files.*not supported. Remove it and put the files into imagesTr"),
    ],
)
def test_each_fault_of_dataset_json_is_named(dataset: Path, changes: dict[str, object], message: str) -> None:
    edit(dataset, **changes)
    with pytest.raises(DatasetError, match=rf"dataset\.json: .*{message}"):
        read_dataset_json(dataset)


def test_all_faults_of_dataset_json_come_at_once(dataset: Path) -> None:
    edit(dataset, numTraining="6", file_ending=".png", labels={"liver": 1})
    assert len(problems(dataset)) == 3


def test_channels_in_another_order_than_the_site_says_are_refused(dataset: Path) -> None:
    line = only_problem(dataset, channels=["FLAIR", "T1"])
    assert "dataset.json: channel_names in order are ['T1', 'FLAIR']" in line
    assert "configuration says ['FLAIR', 'T1']. Make them equal" in line


# Files present


def test_numtraining_must_be_the_number_of_cases(dataset: Path) -> None:
    edit(dataset, numTraining=7)
    assert "dataset.json: numTraining is 7 but imagesTr holds 6 cases. Set it to 6" in only_problem(dataset)


@pytest.mark.parametrize(
    ("num_folds", "remaining", "message"),
    [
        (6, 5, "6-fold cross-validation needs at least 6. Add cases or train"),
        (None, 1, "fold 'all' needs at least 2. Add"),
    ],
)
def test_too_few_cases_for_the_folds(dataset: Path, num_folds: int | None, remaining: int, message: str) -> None:
    edit(dataset, numTraining=remaining)
    for i in range(remaining, 6):
        for path in dataset.glob(f"*Tr/p{i}*"):
            path.unlink()
    assert f"imagesTr: {remaining} training cases; {message}" in only_problem(dataset, num_folds=num_folds)


def test_two_cases_are_enough_for_fold_all(dataset: Path) -> None:
    edit(dataset, numTraining=2)
    for path in [path for i in range(2, 6) for path in dataset.glob(f"*Tr/p{i}*")]:
        path.unlink()
    assert check_dataset(dataset, num_folds=None).num_training == 2


def delete(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def put(name: str, array: np.ndarray, **grid: object) -> Callable[[Path], None]:
    return lambda folder: write(folder / name, array, **grid)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (
            delete("labelsTr/p3.nii.gz"),
            "labelsTr/p3.nii.gz is missing for imagesTr/p3_0000.nii.gz. Add the label or remove",
        ),
        (put("labelsTr/p9.nii.gz", label()), "labelsTr/p9.nii.gz has no image imagesTr/p9_0000.nii.gz. Add the image"),
        (put("labelsTs/q9.nii.gz", label()), "labelsTs/q9.nii.gz has no image imagesTs/q9_0000.nii.gz. Add the image"),
        (
            delete("imagesTr/p3_0001.nii.gz"),
            "imagesTr/p3_0001.nii.gz is missing (channel 1, 'FLAIR'). Every case needs all",
        ),
        (delete("imagesTs/q0_0000.nii.gz"), "imagesTs/q0_0000.nii.gz is missing (channel 0, 'T1')"),
        (
            put("imagesTr/p3_0002.nii.gz", voxels()),
            "imagesTr/p3_0002.nii.gz is channel 2, but dataset.json names 2 channels",
        ),
        (put("imagesTr/scan.nii.gz", voxels()), "imagesTr/scan.nii.gz is not named CASE_0000.nii.gz. Rename it"),
        (put("imagesTr/p3_01.nii.gz", voxels()), "imagesTr/p3_01.nii.gz is not named CASE_0000.nii.gz. Rename it"),
        (put("imagesTr/p8_0000.nii", voxels()), "imagesTr/p8_0000.nii is not named CASE_0000.nii.gz. Rename it"),
    ],
)
def test_files_missing_surplus_or_misnamed(dataset: Path, break_it: Callable[[Path], None], message: str) -> None:
    break_it(dataset)
    lines = problems(dataset)
    assert any(message in line for line in lines), lines
    assert len(lines) <= 2  # a label without image may also show as a count


@pytest.mark.parametrize(
    "name",
    [
        "imagesTr/p3_0001.nii.gz",
        "labelsTr/p3.nii.gz",
        "imagesTs/q0_0000.nii.gz",
        "labelsTs/q0.nii.gz",
        "labelsCommon/r0.nii.gz",
    ],
)
def test_a_link_that_leads_nowhere_is_named_as_such(dataset: Path, name: str) -> None:
    write(dataset / "labelsTs/q0.nii.gz", label())
    (dataset / name).unlink(missing_ok=True)
    (dataset / name).parent.mkdir(exist_ok=True)
    (dataset / name).symlink_to("/gone/file.nii.gz")
    assert f"{name} is a link to /gone/file.nii.gz, where there is no file. Link" in only_problem(dataset)


def test_a_link_that_leads_nowhere_is_no_training_case(dataset: Path) -> None:
    (dataset / "labelsTr/p3.nii.gz").unlink()
    (dataset / "labelsTr/p3.nii.gz").symlink_to("gone.nii.gz")
    with pytest.raises(DatasetError, match=r"1 problem .*\n- labelsTr/p3\.nii\.gz is a link to gone\.nii\.gz"):
        list_training_cases(dataset, read_dataset_json(dataset))


def test_a_test_case_without_label_is_refused_once_others_have_one(dataset: Path) -> None:
    for channel in range(2):
        write(dataset / f"imagesTs/q1_{channel:04d}.nii.gz", voxels())
    write(dataset / "labelsTs/q0.nii.gz", label())
    assert "labelsTs/q1.nii.gz is missing for imagesTs/q1_0000.nii.gz" in only_problem(dataset)


@pytest.mark.parametrize("images", ["imagesTs", "imagesCommon", "imagesCommonVal"])
def test_a_case_to_train_on_and_to_test_on_is_refused(dataset: Path, images: str) -> None:
    (dataset / images).mkdir(exist_ok=True)
    for channel in range(2):
        write(dataset / f"{images}/p3_{channel:04d}.nii.gz", voxels(channel))
    assert f"{images}: the cases of imagesTr are there too: p3 (1 in all). A model" in only_problem(dataset)
    for path in sorted((dataset / "imagesTr").iterdir()):
        (dataset / images / path.name).write_bytes(path.read_bytes())
    assert "are there too: p0, p1, p2, p3, p4, ... (6 in all)" in only_problem(dataset)


@pytest.mark.parametrize("keep_folder", [True, False])
def test_no_images_at_all(dataset: Path, keep_folder: bool) -> None:
    for path in dataset.glob("*Tr/*"):
        path.unlink()
    if not keep_folder:
        (dataset / "imagesTr").rmdir()
    state = "holds no images" if keep_folder else "does not exist"
    message = f"imagesTr {state}. Put the images there, named CASE_0000.nii.gz."
    assert only_problem(dataset).endswith(message)
    with pytest.raises(DatasetError, match=state):
        list_cases(dataset, read_dataset_json(dataset))


def test_listing_cases_names_every_bad_file(dataset: Path) -> None:
    (dataset / "imagesTr/p1_0001.nii.gz").unlink()
    write(dataset / "imagesTr/scan.nii.gz", voxels())
    with pytest.raises(DatasetError, match=r"(?s)2 problems.*scan\.nii\.gz is not named.*p1_0001\.nii\.gz is missing"):
        list_cases(dataset, read_dataset_json(dataset))


def test_training_cases_need_their_labels(dataset: Path) -> None:
    (dataset / "labelsTr/p1.nii.gz").unlink()
    (dataset / "imagesTr/p4_0000.nii.gz").unlink()
    with pytest.raises(DatasetError, match=r"(?s)2 problems.*p4_0000\.nii\.gz is missing.*labelsTr/p1\.nii\.gz is mi"):
        list_training_cases(dataset, read_dataset_json(dataset))


# Voxels


def with_voxel(value: float) -> np.ndarray:
    array = voxels()
    array[3, 4, 5] = value
    return array


def float_label(value: float) -> np.ndarray:
    array = label().astype(np.float32)
    array[3, 4, 5] = value
    return array


def many_labels() -> np.ndarray:
    return np.arange(np.prod(SHAPE_ZYX)).reshape(SHAPE_ZYX).astype(np.int16)


@pytest.mark.parametrize(
    ("name", "array", "grid", "message"),
    [
        (LABEL, label()[:, :, :5], {}, f"another grid than {FIRST}: size (5, 7, 8) instead of (6, 7, 8)"),
        (LABEL, label(), {"spacing": (1.0, 2.0, 1.5)}, "spacing (1.0, 2.0, 1.5) mm instead of (1.0, 1.5, 2.0) mm"),
        (LABEL, label(), {"origin": (-11.0, 22.0, 33.1)}, "origin (-11.0, 22.0, 33.1) mm instead of (-11.0, 22.0, 33"),
        (LABEL, label(), {"angle": 0.31}, f"another grid than {FIRST}: direction (0.9523"),
        (SECOND, voxels(), {"spacing": (1.0, 1.5, 2.1)}, f"another grid than {FIRST}: spacing"),
        ("imagesTs/q0_0001.nii.gz", voxels()[:, :6], {}, "another grid than imagesTs/q0_0000.nii.gz: size (6, 6, 8)"),
        (LABEL, label(7), {}, "holds the label values 7 in 26 voxels; dataset.json knows [0, 1, 2]. Correct"),
        (LABEL, many_labels(), {}, "holds the label values 3, 4, 5, 6, 7, ... in 333 voxels"),
        (LABEL, float_label(1.5), {}, "holds the label values 1.5 in 1 voxels"),
        (LABEL, float_label(np.nan), {}, "holds the label values nan in 1 voxels"),
        ("labelsTs/q0.nii.gz", label(9), {}, "holds the label values 9 in 26 voxels"),
        (SECOND, with_voxel(np.nan), {}, "has 1 voxels that are NaN or infinite. Replace them"),
        (FIRST, with_voxel(-np.inf), {}, "has 1 voxels that are NaN or infinite. Replace them"),
        ("imagesTs/q0_0000.nii.gz", with_voxel(np.inf), {}, "has 1 voxels that are NaN or infinite. Replace them"),
        (FIRST, np.full(SHAPE_ZYX, 4, np.int16), {}, "is 4 in every voxel. Remove the case, or export"),
        (SECOND, voxels()[0], {}, "has 2 dimensions of (6, 7) and 1 values per voxel; expected 3"),
        (SECOND, np.stack([voxels(1), voxels(2)]), {}, "has 4 dimensions of (6, 7, 8, 2)"),
        (LABEL, label()[3], {}, "has 2 dimensions of (6, 7) and 1 values per voxel; expected 3"),
    ],
)
def test_each_fault_in_a_file_is_named(
    dataset: Path, name: str, array: np.ndarray, grid: dict[str, object], message: str
) -> None:
    put(name, array, **grid)(dataset)
    line = only_problem(dataset)
    assert line.startswith(f"- {name} ")
    assert message in line


def test_an_image_of_zeros_may_stand_for_a_missing_sequence_but_not_for_all(dataset: Path) -> None:
    put(SECOND, np.zeros(SHAPE_ZYX, np.float32))(dataset)
    assert only_problem(dataset).startswith(f"- {SECOND} is 0 in every voxel")
    check_dataset(dataset, missing_channels=True)
    put(FIRST, np.zeros(SHAPE_ZYX, np.float32))(dataset)
    with pytest.raises(DatasetError, match=f"2 problems.*\n- {FIRST} is 0 in every voxel"):
        check_dataset(dataset, missing_channels=True)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def cut_after_unzipping(path: Path) -> None:
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[:600]))


def empty(path: Path) -> None:
    path.write_bytes(b"")


def text(path: Path) -> None:
    path.write_text("<html>404 not found</html>")


def picture(path: Path) -> None:
    png = path.with_name("picture.png")
    sitk.WriteImage(sitk.GetImageFromArray(label()[3]), str(png))
    png.replace(path)


@pytest.mark.parametrize("spoil", [cut, cut_after_unzipping, empty, text, picture])
@pytest.mark.parametrize("name", ["imagesTr/p4_0000.nii.gz", "labelsTr/p4.nii.gz"])
def test_a_damaged_file_is_one_line(dataset: Path, name: str, spoil: Callable[[Path], None]) -> None:
    spoil(dataset / name)
    line = only_problem(dataset)
    assert line.startswith(f"- {name} cannot be read (")
    assert line.endswith("copy or convert it again.")


@pytest.mark.parametrize("ending", [".mha", ".nrrd"])
def test_other_formats_are_read_and_cut_off_files_found(dataset: Path, ending: str) -> None:
    edit(dataset, file_ending=ending)
    for path in dataset.glob("*/*.nii.gz"):
        sitk.WriteImage(sitk.ReadImage(str(path)), str(path).replace(".nii.gz", ending))
        path.unlink()
    assert check_dataset(dataset).num_training == 6
    broken = dataset / f"imagesTr/p4_0000{ending}"
    broken.write_bytes(broken.read_bytes()[:-100])
    assert f"imagesTr/p4_0000{ending} cannot be read (" in only_problem(dataset)


def test_all_problems_come_in_one_error(dataset: Path) -> None:
    edit(dataset, numTraining=9)
    cut(dataset / "imagesTr/p0_0000.nii.gz")
    write(dataset / "labelsTr/p1.nii.gz", label(7))
    (dataset / "labelsTr/p2.nii.gz").unlink()
    write(dataset / "imagesTr/p5_0001.nii.gz", with_voxel(np.nan), spacing=(3.0, 3.0, 3.0))
    lines = problems(dataset, channels=["T2"])
    for part in ("numTraining", "p0_0000", "labelsTr/p1", "labelsTr/p2", "NaN", "another grid", "['T2']"):
        assert sum(part in line for line in lines) == 1, part
    assert len(lines) == 7


def test_a_long_list_is_cut(dataset: Path) -> None:
    for i in range(23):
        write(dataset / f"labelsTr/extra{i:02d}.nii.gz", label())
    lines = problems(dataset)
    assert len(lines) == 21
    assert lines[-1] == "... and 3 more"


# Damaged headers and splits


@pytest.mark.parametrize("edge", [1e-6, 2e4])
def test_voxels_of_no_possible_size_are_refused(dataset: Path, edge: float) -> None:
    for name in (FIRST, SECOND, LABEL):
        write(dataset / name, label() if name == LABEL else voxels(7), spacing=(1.0, edge, 1.0))
    assert [line.split(" has ")[0] for line in problems(dataset)] == [f"- {name}" for name in (FIRST, SECOND, LABEL)]
    assert "expected edges of 0.0001 to 10000 mm. The header is damaged" in problems(dataset)[0]


def test_a_header_that_promises_more_than_the_file_can_hold_asks_for_no_memory(dataset: Path) -> None:
    whole = bytearray(gzip.decompress((dataset / FIRST).read_bytes()))
    whole[42:48] = np.array([30_000, 30_000, 30_000], "<i2").tobytes()  # dim[1..3]
    (dataset / FIRST).write_bytes(gzip.compress(bytes(whole)))
    with pytest.raises(OSError, match="the header says 108000000000000 bytes of voxels, the file holds"):
        checks.read_voxels(dataset / FIRST)
    assert any(FIRST in line and "cannot be read (the header says" in line for line in problems(dataset))


def with_header(path: Path, offset: int, dtype: str, values: list[int]) -> None:
    """Write numbers over those of a NIfTI header."""
    whole = bytearray(gzip.decompress(path.read_bytes()))
    put_in = np.array(values, dtype).tobytes()
    whole[offset : offset + len(put_in)] = put_in
    path.write_bytes(gzip.compress(bytes(whole)))


@pytest.mark.parametrize("name", [FIRST, LABEL])
def test_an_image_of_no_voxels_is_named(dataset: Path, name: str) -> None:
    with_header(dataset / name, 40, "<i2", [4, 6, 7, 8, 0])  # dim: four axes, the last of length 0
    assert only_problem(dataset).startswith(f"- {name} holds 0 voxels; expected 336 on a grid of (6, 7, 8). The header")


@pytest.mark.parametrize("name", [FIRST, LABEL])
def test_an_image_of_colours_is_named(dataset: Path, name: str) -> None:
    with_header(dataset / name, 70, "<i2", [128, 24])  # datatype RGB24 and its bits per voxel
    with pytest.raises(DatasetError, match=f"{name} has 3 dimensions of .* and 3 values per voxel; expected 3 dim"):
        checks.read_image(dataset / name)
    assert only_problem(dataset).startswith(f"- {name} has 3 dimensions of (6, 7, 8) and 3 values per voxel")


def test_splits_are_read_by_fold(tmp_path: Path) -> None:
    folds = [{"train": ["a", "b"], "val": ["c"]}, {"train": ["c"], "val": []}]
    (tmp_path / "splits_final.json").write_text(json.dumps(folds))
    assert read_splits(tmp_path / "splits_final.json") == folds


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[{", "not valid JSON"),
        ("[" * 10**5, "not valid JSON"),
        ('{"train": [], "val": []}', "expected a list of folds"),
        ('[{"train": ["a"]}]', "expected a list of folds"),
        ('[{"train": ["a"], "val": [1]}]', "expected a list of folds"),
        ('[{"train": "a", "val": ["b"]}]', "expected a list of folds"),
    ],
)
def test_damaged_splits_are_refused_by_file(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "splits_final.json").write_text(text)
    with pytest.raises(DatasetError, match=rf"splits_final\.json: {said}"):
        read_splits(tmp_path / "splits_final.json")


def test_the_data_set_s_own_split_comes_before_nnunet_s(tmp_path: Path) -> None:
    own, other = tmp_path / "raw/Dataset001_A", tmp_path / "preprocessed/Dataset001_A"
    assert find_splits(own, tmp_path / "preprocessed") is None
    for folder in (other, own):
        folder.mkdir(parents=True)
        (folder / "splits_final.json").write_text("[]")
        assert find_splits(own, tmp_path / "preprocessed") == folder / "splits_final.json"
        assert find_splits(own, None) == (own / "splits_final.json" if folder == own else None)


def test_only_the_fold_that_is_trained_must_name_cases_that_are_there(tmp_path: Path) -> None:
    file = tmp_path / "splits_final.json"
    file.write_text(json.dumps([{"train": ["a"], "val": ["b"]}, {"train": ["a"], "val": ["c", "d"]}]))
    check_splits(file, ["a", "b"], 0)
    for fold in (1, None):
        with pytest.raises(DatasetError, match=r"names 2 cases that imagesTr does not hold: \['c', 'd'\]\. Correct"):
            check_splits(file, ["a", "b"], fold)
    with pytest.raises(DatasetError, match=r"has 2 folds, fold is 2; set sites.fold to 0 to 1$"):
        check_splits(file, ["a", "b", "c", "d"], 2)
