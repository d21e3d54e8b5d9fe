import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from fedcmt.evaluation.metrics import EvaluationError, case_scores, evaluate_folder, label_masks, write_scores

ORGAN = {"labels": {"background": 0, "organ": 1}}
REGIONS = {"labels": {"background": 0, "WT": [1, 2, 3], "TC": [2, 3], "ET": 3, "ignore": 4}}


def maps(tp: int, fp: int, fn: int, tn: int = 5) -> tuple[np.ndarray, np.ndarray]:
    prediction = [1] * tp + [1] * fp + [0] * fn + [0] * tn
    reference = [1] * tp + [0] * fp + [1] * fn + [0] * tn
    return np.array(prediction), np.array(reference)


def write(path: Path, array: np.ndarray, spacing: tuple[float, ...] = (1, 1, 2)) -> None:
    path.parent.mkdir(exist_ok=True)
    image = sitk.GetImageFromArray(array.astype(np.uint8))
    image.SetSpacing(spacing)
    sitk.WriteImage(image, str(path))


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    for case, counts in {"a": (8, 2, 2, 6), "b": (6, 2, 4, 6), "c": (0, 0, 0, 18)}.items():
        for name, array in zip(("predictions", "references"), maps(*counts), strict=True):
            write(tmp_path / name / f"{case}.nii.gz", array.reshape(1, 3, 6))
    return tmp_path / "predictions", tmp_path / "references"


def test_label_masks_keep_order_and_drop_background_and_ignore() -> None:
    assert list(label_masks(REGIONS).items()) == [("WT", (1, 2, 3)), ("TC", (2, 3)), ("ET", (3,))]
    assert label_masks(ORGAN) == {"organ": (1,)}


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ((8, 2, 2), {"dice": 0.8, "iou": 8 / 12, "sensitivity": 0.8, "ppv": 0.8, "tp": 8, "fp": 2, "fn": 2}),
        ((6, 2, 4), {"dice": 12 / 18, "iou": 0.5, "sensitivity": 0.6, "ppv": 0.75, "tp": 6, "fp": 2, "fn": 4}),
        ((0, 0, 0), {"dice": 1, "iou": 1, "sensitivity": math.nan, "ppv": math.nan, "tp": 0, "fp": 0, "fn": 0}),
        ((0, 3, 0), {"dice": 0, "iou": 0, "sensitivity": math.nan, "ppv": 0, "tp": 0, "fp": 3, "fn": 0}),
        ((0, 0, 3), {"dice": 0, "iou": 0, "sensitivity": 0, "ppv": math.nan, "tp": 0, "fp": 0, "fn": 3}),
    ],
)
def test_case_scores(counts: tuple[int, int, int], expected: dict[str, float]) -> None:
    scores = case_scores(*maps(*counts), ORGAN)["organ"]
    assert scores == pytest.approx(expected, nan_ok=True)
    assert scores["iou"] == pytest.approx(scores["dice"] / (2 - scores["dice"]))


def test_regions_are_unions_and_ignored_voxels_count_nowhere() -> None:
    prediction = np.array([1, 2, 3, 0, 3, 1])
    reference = np.array([[2, 2, 2, 1, 4, 4]]).reshape(6)
    scores = case_scores(prediction, reference, REGIONS)
    assert {n: (s["tp"], s["fp"], s["fn"]) for n, s in scores.items()} == {
        "WT": (3, 0, 1),
        "TC": (2, 0, 1),
        "ET": (0, 1, 0),
    }


def test_shapes_must_match() -> None:
    with pytest.raises(EvaluationError, match=r"\(2, 3\).*\(3, 2\)"):
        case_scores(np.zeros((2, 3)), np.zeros((3, 2)), ORGAN)


def test_folder_means(folders: tuple[Path, Path]) -> None:
    write(folders[0] / "without_reference.nii.gz", np.zeros((1, 3, 6)))
    scores = evaluate_folder(*folders, ORGAN)
    assert scores.cases == 3
    assert scores.dice == {"organ": pytest.approx((0.8 + 12 / 18 + 1) / 3)}
    assert scores.iou == {"organ": pytest.approx((8 / 12 + 0.5 + 1) / 3)}
    assert scores.mean_dice == scores.dice["organ"]
    dice, iou = scores.dice["organ"], scores.iou["organ"]
    assert dice / (2 - dice) <= iou <= dice
    assert "per_case" not in scores.summary()


def test_mean_dice_is_the_mean_over_labels(tmp_path: Path) -> None:
    write(tmp_path / "p" / "a.nii.gz", np.array([[[1, 1, 2, 0]]]))
    write(tmp_path / "r" / "a.nii.gz", np.array([[[1, 1, 0, 2]]]))
    scores = evaluate_folder(tmp_path / "p", tmp_path / "r", {"labels": {"background": 0, "x": 1, "y": 2}})
    assert (scores.dice, scores.mean_dice) == ({"x": 1.0, "y": 0.0}, 0.5)


def test_written_files(folders: tuple[Path, Path], tmp_path: Path) -> None:
    as_json, as_csv = write_scores(evaluate_folder(*folders, ORGAN), tmp_path / "out")
    content = json.loads(as_json.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert [row["case"] for row in content["per_case"]] == ["a", "b", "c"]
    assert content["per_case"][2]["ppv"] is None
    rows = list(csv.reader(as_csv.read_text().splitlines()))
    assert rows[0] == ["case", "label", "dice", "iou", "sensitivity", "ppv", "tp", "fp", "fn"]
    assert rows[1][:2] == ["a", "organ"]
    assert [float(v) for v in rows[1][2:]] == pytest.approx([0.8, 8 / 12, 0.8, 0.8, 8, 2, 2])
    assert rows[3] == ["c", "organ", "1.0", "1.0", "", "", "0", "0", "0"]
    assert rows[4][:2] == ["mean", "organ"]
    assert float(rows[4][4]) == pytest.approx(0.7)  # over the two cases that have the organ
    assert {f.name for f in (tmp_path / "out").iterdir()} == {"metrics.json", "metrics.csv"}


def test_missing_prediction_is_named(folders: tuple[Path, Path]) -> None:
    (folders[0] / "b.nii.gz").unlink()
    with pytest.raises(EvaluationError, match=r"1 of 3 predictions are missing: b\.nii\.gz"):
        evaluate_folder(*folders, ORGAN)


def test_no_references(folders: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="no reference label maps"):
        evaluate_folder(folders[0], tmp_path, ORGAN)


@pytest.mark.parametrize("what", ["size", "spacing", "origin", "direction"])
def test_geometry_must_match(folders: tuple[Path, Path], what: str) -> None:
    image = sitk.ReadImage(str(folders[0] / "b.nii.gz"))
    if what == "size":
        image = image[:5, :, :]
    elif what == "spacing":
        image.SetSpacing((1, 1, 2.01))
    elif what == "origin":
        image.SetOrigin((0, 0.1, 0))
    else:
        image.SetDirection((-1, 0, 0, 0, -1, 0, 0, 0, 1))
    sitk.WriteImage(image, str(folders[0] / "b.nii.gz"))
    with pytest.raises(EvaluationError, match=rf"b\.nii\.gz: {what}"):
        evaluate_folder(*folders, ORGAN)


def test_damaged_file_is_named(folders: tuple[Path, Path]) -> None:
    (folders[1] / "c.nii.gz").write_bytes(b"no image")
    with pytest.raises(EvaluationError, match=r"references/c\.nii\.gz: not a readable image"):
        evaluate_folder(*folders, ORGAN)
