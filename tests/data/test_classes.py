"""Classes of cases: what each source gives, and every fault named with its file and a remedy."""

import json
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from fedcmt.data.checks import DatasetError, read_dataset_json
from fedcmt.data.classes import SOURCES, CaseClasses, read_classes

# Values are not in the order of names, nor names in the order of the alphabet.
LABELS = {"background": 0, "spleen": 2, "liver": 1, "kidney": 3, "ignore": 4}
# Voxels per label value of the case's label image, of 4 x 5 x 6 = 120.
VOXELS = {
    "a": {1: 10, 2: 3},
    "b": {2: 7, 3: 8, 4: 60},
    "c": {2: 6, 3: 6},
    "d": {},
    "e": {1: 1},
}


def write(folder: Path, case: str, split: str, voxels: dict[int, int] | None) -> None:
    """Images of 4 x 5 x 6 voxels; without a label image if ``voxels`` is None."""
    flat = np.zeros(120, np.uint8)
    flat[: sum((voxels or {}).values())] = [value for value, count in (voxels or {}).items() for _ in range(count)]
    arrays = {
        f"images{split}/{case}_0000.nii.gz": np.arange(120, dtype=np.float32),
        f"labels{split}/{case}.nii.gz": flat,
    }
    for path, array in list(arrays.items())[: 1 if voxels is None else 2]:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        sitk.WriteImage(sitk.GetImageFromArray(array.reshape(6, 5, 4)), str(folder / path))


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Training cases a to d, the test cases e with a label image and f without."""
    folder = tmp_path_factory.mktemp("raw") / "Dataset042_Tiny"
    for case in "abcd":
        write(folder, case, "Tr", VOXELS[case])
    write(folder, "e", "Ts", VOXELS["e"])
    write(folder, "f", "Ts", None)
    content = {"channel_names": {"0": "CT"}, "labels": LABELS, "numTraining": 4, "file_ending": ".nii.gz"}
    (folder / "dataset.json").write_text(json.dumps(content))
    return folder


@pytest.fixture
def dataset(shared: Path, tmp_path: Path) -> Path:
    """The shared data set's images by link; what is added beside them is the test's own."""
    folder = tmp_path / shared.name
    folder.mkdir()
    for path in shared.iterdir():
        (folder / path.name).symlink_to(path)
    return folder


CONTENT = {"classes": ["none", "cyst"], "cases": {"a": 1, "b": 0, "c": None, "d": 1, "e": 0, "f": None}}


def from_json(folder: Path, **changes: object) -> CaseClasses:
    (folder / "classes.json").write_text(json.dumps(CONTENT | changes))
    return read_classes(folder, read_dataset_json(folder), "classes.json")


def from_csv(folder: Path, *lines: str) -> CaseClasses:
    (folder / "classes.csv").write_text("\n".join(lines), encoding="utf-8")
    return read_classes(folder, read_dataset_json(folder), "classes.csv")


def majority(folder: Path, labels: dict | None = None) -> CaseClasses:
    dataset_json = read_dataset_json(folder)
    return read_classes(folder, {**dataset_json, "labels": labels or dataset_json["labels"]}, "majority")


def cases(**changes: object) -> dict[str, dict]:
    return {"cases": {**CONTENT["cases"], **changes}}  # type: ignore[dict-item]


# What each source gives


def test_json_gives_indices_and_minus_one_for_null(dataset: Path) -> None:
    expected = {"a": 1, "b": 0, "c": -1, "d": 1, "e": 0, "f": -1}
    assert from_json(dataset) == CaseClasses(("none", "cyst"), expected)


def test_csv_gives_classes_in_the_order_of_their_names(dataset: Path) -> None:
    classes = from_csv(dataset, "case,class", "b,none", "a,cyst", "", "c,", "d,none", 'e,"cyst"', "f,none")
    assert classes == CaseClasses(("cyst", "none"), {"a": 0, "b": 1, "c": -1, "d": 1, "e": 0, "f": 1})


def test_csv_may_begin_with_a_byte_order_mark(dataset: Path) -> None:
    assert from_csv(dataset, "\ufeffcase,class", "a,x", "b,y", "c,", "d,", "e,", "f,").names == ("x", "y")


def test_majority_is_the_foreground_label_with_most_voxels_of_the_whole_case(shared: Path, tmp_path: Path) -> None:
    folder = tmp_path / "Dataset042_Tiny"
    for case, voxels in (VOXELS | {"c2": {2: 9}}).items():
        write(folder, case, "Ts" if case == "e" else "Tr", voxels)
    write(folder, "f", "Ts", None)
    classes = read_classes(folder, read_dataset_json(shared), "majority")
    # b: ignore counts nowhere; c: a tie goes to the lower value; d: no foreground; f: no label image.
    expected = {"a": 0, "b": 2, "c": 1, "c2": 1, "d": -1, "e": 0, "f": -1}
    assert classes == CaseClasses(("liver", "spleen", "kidney"), expected)


def test_a_data_set_without_test_cases_is_read(dataset: Path) -> None:
    (dataset / "imagesTs").unlink()
    (dataset / "labelsTs").unlink()
    assert set(majority(dataset).cases) == set("abcd")


# Faults


def test_all_problems_come_in_one_error(dataset: Path) -> None:
    with pytest.raises(DatasetError) as error:
        from_json(dataset, cases={"a": 2, "b": 0, "c": 0, "e": 0, "z": 1})
    first, *lines = str(error.value).splitlines()
    assert first.startswith("Dataset042_Tiny: 5 problems in ")
    assert lines == [
        "- classes.json: case 'a' has class 2; expected an index from 0 to 1, or null. Correct it.",
        "- classes.json: case 'd' of imagesTr is missing. Add it, with null if its class is not known.",
        "- classes.json: case 'f' of imagesTs is missing. Add it, with null if its class is not known.",
        "- classes.json: case 'z' has no image in imagesTr or imagesTs. Remove it or add the images.",
        "- classes.json: class 'cyst' has no training case, so it cannot be learnt. Add a case or remove the class.",
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"classes": "none"}, r"classes\.json: expected the keys 'classes' .a list.*'classes': 'str'"),
        ({"cases": [0, 1]}, r"found .*'cases': 'list'"),
        ({"labels": {}}, r"and no other, found .*'labels': 'dict'"),
        ({"classes": ["none", ""]}, r"class names \[''\]; expected texts"),
        ({"classes": ["none", " cyst"]}, r"class names \[' cyst'\]; expected texts"),
        ({"classes": ["none", 7]}, r"class names \[7\]; expected texts"),
        ({"classes": ["cyst", "cyst"]}, r"class names \['cyst', 'cyst'\] repeat a name"),
        ({"classes": ["cyst"]}, r"the classes are \['cyst'\]; expected at least 2"),
        (cases(a=-1), "case 'a' has class -1; expected an index from 0 to 1, or null"),
        (cases(a=True), "case 'a' has class True"),
        (cases(a=1.0), r"case 'a' has class 1\.0"),
        (cases(a="cyst"), "case 'a' has class 'cyst'"),
        (cases(a=None, b=None, d=None), r"class of no training case is known.*\['none', 'cyst'\]"),
        (cases(b=None), "class 'none' has no training case"),
    ],
)
def test_each_fault_of_classes_json_is_named(dataset: Path, changes: dict, message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        from_json(dataset, **changes)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], r"classes\.csv: the columns are \[\]; expected \['case', 'class'\]"),
        (["case,class,age"], r"the columns are \['case', 'class', 'age'\]"),
        (["case;class", "a;x"], r"the columns are \['case;class'\]"),
        (["case,class", "a"], r"\['a'\] has 1 cells"),
        (["case,class", "a,x,y"], r"\['a', 'x', 'y'\] has 3 cells"),
        (["case,class", "a,x", "a,y"], "case 'a' stands there 2 times"),
        (["case,class", "a,x", "b,y", "c, y"], r"class names \[' y'\]"),
        (["case,class", "a,x", "b,x"], r"the classes are \['x'\]; expected at least 2"),
        (["case,class", "a,x", "b,y", "g,y"], "case 'g' has no image"),
        (["case,class", "a,x", "b,y"], "case 'f' of imagesTs is missing. Add it, with an empty cell"),
        (["case,class", "a,x", "b,x", "e,y"], "class 'y' has no training case"),
        (["case,class", "a,", "e,y", "f,x"], "class of no training case is known"),
        (["case,class", 'a,"x'], r"classes\.csv: not a CSV file"),
    ],
)
def test_each_fault_of_classes_csv_is_named(dataset: Path, lines: list[str], message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        from_csv(dataset, *lines)


@pytest.mark.parametrize("source", ["classes.json", "classes.csv"])
def test_a_missing_or_damaged_file_is_named(dataset: Path, source: str) -> None:
    with pytest.raises(DatasetError, match=rf"{source}: file not found; write it as"):
        read_classes(dataset, read_dataset_json(dataset), source)
    (dataset / source).write_bytes(b"\xff\xfe{")
    with pytest.raises(DatasetError, match=rf"{source}: not "):
        read_classes(dataset, read_dataset_json(dataset), source)


@pytest.mark.parametrize(("source", "other"), [SOURCES[:2], SOURCES[1::-1]])
def test_the_other_file_is_pointed_out_and_not_read(
    dataset: Path, source: str, other: str, caplog: pytest.LogCaptureFixture
) -> None:
    cases = {"a": 0, "b": 1, "c": 0, "d": 1, "e": 0, "f": 1}
    content = {
        "classes.json": json.dumps({"classes": ["x", "y"], "cases": cases}),
        "classes.csv": "case,class\n" + "".join(f"{case},{'xy'[index]}\n" for case, index in cases.items()),
    }
    (dataset / other).write_text(content[other])
    with pytest.raises(DatasetError, match=rf"{source}: file not found; set the site's \"classes\" to \"{other}\""):
        read_classes(dataset, read_dataset_json(dataset), source)
    (dataset / other).write_text("not read")
    (dataset / source).write_text(content[source])
    assert read_classes(dataset, read_dataset_json(dataset), source) == CaseClasses(("x", "y"), cases)
    assert f"{other} is there as well and is not read" in caplog.text


def test_regions_have_no_majority(dataset: Path) -> None:
    labels = {"background": 0, "whole": [1, 2], "core": 2}
    with pytest.raises(DatasetError, match=r"dataset\.json: labels \['whole'\] are regions.*Write classes\.json"):
        majority(dataset, labels)


def test_a_label_that_no_case_has_most_of_is_no_class(dataset: Path) -> None:
    with pytest.raises(DatasetError, match="majority: class 'kidney' has no training case"):
        majority(dataset, {"background": 0, "liver": 1, "spleen": 2, "kidney": 3, "cyst": 4})


def test_a_damaged_label_image_has_no_majority(shared: Path, dataset: Path) -> None:
    (dataset / "labelsTr").unlink()
    (dataset / "labelsTr").mkdir()
    for path in (shared / "labelsTr").iterdir():
        content = path.read_bytes()
        (dataset / "labelsTr" / path.name).write_bytes(content[:40] if path.name == "b.nii.gz" else content)
    with pytest.raises(DatasetError, match=r"labelsTr/b\.nii\.gz cannot be read \(.*\)\. Copy"):
        majority(dataset)


def test_an_unknown_source_lists_those_there_are(dataset: Path) -> None:
    assert SOURCES == ("classes.json", "classes.csv", "majority")
    with pytest.raises(ValueError, match=r"'labels': expected one of \['classes\.json', 'classes\.csv', 'majority'\]"):
        read_classes(dataset, read_dataset_json(dataset), "labels")
