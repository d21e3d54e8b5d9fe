import csv
import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from monai.metrics import compute_hausdorff_distance

from fedcmt.evaluation.metrics import (
    HD95_PENALTY_MM,
    EvaluationError,
    case_scores,
    evaluate_folder,
    hd95_of_distances,
    label_masks,
    write_scores,
)

ORGAN = {"labels": {"background": 0, "organ": 1}}
REGIONS = {"labels": {"background": 0, "WT": [1, 2, 3], "TC": [2, 3], "ET": 3, "ignore": 4}}


def maps(tp: int, fp: int, fn: int, tn: int = 5) -> tuple[np.ndarray, np.ndarray]:
    prediction = [1] * tp + [1] * fp + [0] * fn + [0] * tn
    reference = [1] * tp + [0] * fp + [1] * fn + [0] * tn
    return np.array([prediction]), np.array([reference])


def scores_of(prediction: np.ndarray, reference: np.ndarray, spacing_mm: Sequence[float] = (1, 1)) -> dict[str, float]:
    return case_scores(prediction, reference, ORGAN, spacing_mm)["organ"]


def boxes(*slices: tuple[slice, ...], shape: tuple[int, ...] = (7, 8, 9)) -> np.ndarray:
    labels = np.zeros(shape, np.uint8)
    for box in slices:
        labels[box] = 1
    return labels


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
        (
            (8, 2, 2, 5),
            {"dice": 0.8, "iou": 8 / 12, "sensitivity": 0.8, "ppv": 0.8, "specificity": 5 / 7, "tp": 8, "tn": 5},
        ),
        (
            (6, 2, 4, 6),
            {"dice": 12 / 18, "iou": 0.5, "sensitivity": 0.6, "ppv": 0.75, "specificity": 0.75, "fp": 2, "fn": 4},
        ),
    ],
)
def test_t15_ratios_of_a_case(counts: tuple[int, int, int, int], expected: dict[str, float]) -> None:
    scores = scores_of(*maps(*counts))
    assert {key: scores[key] for key in expected} == pytest.approx(expected)
    assert scores["iou"] == pytest.approx(scores["dice"] / (2 - scores["dice"]))


def possible_means(dice: float, iou: float) -> bool:
    """Whether means of Dice and IoU over the same cases and labels can be these.

    IoU is D / (2 - D) of a case's Dice D, which is convex and at most D: by Jensen's inequality the mean IoU lies
    between that of the mean Dice and the mean Dice itself.
    """
    return dice / (2 - dice) <= iou <= dice


def test_t16_the_mean_iou_is_not_the_iou_of_the_mean_dice(tmp_path: Path) -> None:
    for case, counts in {"a": (9, 1, 1, 0), "b": (1, 9, 9, 0)}.items():
        for folder, array in zip(("p", "r"), maps(*counts), strict=True):
            padded = np.zeros((1, 1, 20))
            padded[0, :, : array.size] = array
            write(tmp_path / folder / f"{case}.nii.gz", padded)
    scores = evaluate_folder(tmp_path / "p", tmp_path / "r", ORGAN)
    dice, iou = scores.means["dice"]["organ"], scores.means["iou"]["organ"]
    assert [case["organ"]["dice"] for case in scores.per_case.values()] == pytest.approx([0.9, 0.1])
    assert dice == pytest.approx(0.5)
    assert iou == pytest.approx((9 / 11 + 1 / 19) / 2)  # 0.4354, not 1/3
    assert possible_means(dice, iou)


@pytest.mark.parametrize(
    ("dice", "iou", "possible"),
    [(0.6941, 0.5695, True), (0.4648, 0.3195, True), (0.4640, 0.4653, False), (0.85, 0.80, True)],
    ids=["FedAvg equal", "FedAvg unequal", "FedPer unequal", "centralised"],
)
def test_t16_the_published_fedper_row_is_impossible(dice: float, iou: float, possible: bool) -> None:
    assert possible_means(dice, iou) is possible


def test_t17_hd95_is_the_larger_of_two_directed_percentiles() -> None:
    there, back = np.array([0.0] * 18 + [10, 20]), np.zeros(20)
    assert hd95_of_distances(there, back) == hd95_of_distances(back, there) == pytest.approx(10.5)
    assert np.percentile([*there, *back], 95) == pytest.approx(0.5)  # the other convention, pooled


def test_t17_label_maps_follow_the_same_convention() -> None:
    # Lone voxels are their own surface. Prediction: the reference's 18 and two more, 10 and 20 mm from the nearest.
    # Prediction to reference: 18 zeros, 10 and 20. Reference to prediction: 18 zeros. Pooled it would be 1.5.
    reference = np.zeros((3, 55), np.uint8)
    reference[0, :36:2] = 1
    prediction = reference.copy()
    prediction[0, [34 + 10, 34 + 20]] = 1
    assert scores_of(prediction, reference)["hd95"] == pytest.approx(10.5)
    assert scores_of(reference, prediction)["hd95"] == pytest.approx(10.5)


@pytest.mark.filterwarnings("ignore:.*always_return_as_numpy:FutureWarning")  # MONAI of itself
def test_hd95_is_monai_s() -> None:
    rng = np.random.default_rng(0)
    prediction, reference = (rng.random((7, 8, 9)) < 0.03 for _ in range(2))
    expected = compute_hausdorff_distance(
        prediction[None, None], reference[None, None], include_background=True, percentile=95, spacing=[3.0, 0.5, 1.0]
    )
    assert expected.item() > 1
    assert scores_of(prediction, reference, (3, 0.5, 1))["hd95"] == pytest.approx(expected.item())


@pytest.mark.parametrize(("axis", "expected"), [(0, 10.0), (1, 1.0), (2, 3.0)])
def test_hd95_is_in_mm_of_the_axis(axis: int, expected: float) -> None:
    # A plane across the axis, and the same plane two voxels further on.
    planes = [tuple(slice(at, at + 1) if a == axis else slice(None) for a in range(3)) for at in (2, 4)]
    scores = scores_of(boxes(planes[0]), boxes(planes[1]), spacing_mm=(5, 0.5, 1.5))
    assert scores["hd95"] == pytest.approx(expected)


def test_hd95_counts_surfaces_and_not_what_they_enclose() -> None:
    whole = boxes((slice(1, 6), slice(1, 7), slice(1, 8)))
    hollow = whole.copy()
    hollow[3, 3:5, 3:6] = 0  # deep inside: its wall is 6-neighbours of it, two voxels from the outer surface
    assert scores_of(whole, whole, (1, 1, 1))["hd95"] == 0
    assert scores_of(hollow, whole, (1, 1, 1))["hd95"] == pytest.approx(1)


def test_hd95_does_not_depend_on_where_in_the_volume_the_masks_lie() -> None:
    prediction, reference = (
        boxes((slice(2, 4), slice(3, 5), slice(2, 4))),
        boxes((slice(2, 4), slice(3, 6), slice(3, 7))),
    )
    expected = scores_of(prediction, reference, (3, 1, 2))["hd95"]
    assert expected > 0
    # The union's bounding box, tight, touches every border; and a far larger volume.
    tight = (slice(2, 4), slice(3, 6), slice(2, 7))
    assert scores_of(prediction[tight], reference[tight], (3, 1, 2))["hd95"] == expected
    wide = [np.pad(labels, 9) for labels in (prediction, reference)]
    assert scores_of(*wide, (3, 1, 2))["hd95"] == expected


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ((0, 0, 0, 5), {"dice": 1, "iou": 1, "hd95": 0, "sensitivity": math.nan, "ppv": math.nan, "specificity": 1}),
        ((0, 3, 0, 5), {"dice": 0, "iou": 0, "hd95": 374, "sensitivity": math.nan, "ppv": 0, "specificity": 5 / 8}),
        ((0, 0, 3, 5), {"dice": 0, "iou": 0, "hd95": 374, "sensitivity": 0, "ppv": math.nan, "specificity": 1}),
        ((3, 0, 0, 0), {"dice": 1, "iou": 1, "hd95": 0, "sensitivity": 1, "ppv": 1, "specificity": math.nan}),
    ],
    ids=["both empty", "only the reference empty", "only the prediction empty", "nothing but the label"],
)
def test_t18_empty_label_maps(counts: tuple[int, int, int, int], expected: dict[str, float]) -> None:
    scores = scores_of(*maps(*counts))
    assert {key: scores[key] for key in expected} == pytest.approx(expected, nan_ok=True)


def test_t18_the_penalty_is_declared_and_can_be_set(tmp_path: Path) -> None:
    write(tmp_path / "p" / "a.nii.gz", np.zeros((1, 3, 6)))
    write(tmp_path / "r" / "a.nii.gz", np.ones((1, 3, 6)))
    folders = (tmp_path / "p", tmp_path / "r")
    default, larger = evaluate_folder(*folders, ORGAN), evaluate_folder(*folders, ORGAN, hd95_penalty_mm=1000.0)
    for scores, penalty in ((default, HD95_PENALTY_MM), (larger, 1000.0)):
        assert scores.summary()["hd95"] == {"organ": penalty}
        assert scores.summary()["hd95_penalty_mm"] == penalty
    for wrong in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(EvaluationError, match=f"hd95_penalty_mm is {wrong}"):
            evaluate_folder(*folders, ORGAN, hd95_penalty_mm=wrong)


def test_regions_are_unions_and_ignored_voxels_count_nowhere() -> None:
    prediction = np.array([[1, 2, 3, 0, 3, 1]])
    reference = np.array([[2, 2, 2, 1, 4, 4]])
    scores = case_scores(prediction, reference, REGIONS, (1, 1))
    assert {n: (s["tp"], s["fp"], s["fn"], s["tn"]) for n, s in scores.items()} == {
        "WT": (3, 0, 1, 0),
        "TC": (2, 0, 1, 1),
        "ET": (0, 1, 0, 3),
    }
    # WT: 3 voxels and 4. TC: the reference's first is 1 mm from the nearest of the prediction's two, 1 * 0.9 by the
    # percentile of [1, 0, 0]. ET: only in the prediction.
    assert [s["hd95"] for s in scores.values()] == pytest.approx([0.85, 0.9, HD95_PENALTY_MM])


def test_shapes_must_match() -> None:
    with pytest.raises(EvaluationError, match=r"\(2, 3\).*\(3, 2\)"):
        case_scores(np.zeros((2, 3)), np.zeros((3, 2)), ORGAN, (1, 1))


def test_the_spacing_must_have_the_axes_of_the_maps() -> None:
    with pytest.raises(EvaluationError, match=r"spacing \(1, 1, 1\) does not fit shape \(2, 3\)"):
        case_scores(np.zeros((2, 3)), np.zeros((2, 3)), ORGAN, (1, 1, 1))


def test_folder_means(folders: tuple[Path, Path]) -> None:
    write(folders[0] / "without_reference.nii.gz", np.zeros((1, 3, 6)))
    scores = evaluate_folder(*folders, ORGAN)
    assert scores.cases == 3
    assert scores.mean_dice == pytest.approx((0.8 + 12 / 18 + 1) / 3)
    summary = scores.summary()
    hd95 = [case["organ"].pop("hd95") for case in scores.per_case.values()]
    assert summary.pop("hd95") == {"organ": pytest.approx(sum(hd95) / 3)}
    assert summary == {
        "cases": 3,
        "mean_dice": scores.mean_dice,
        "dice": {"organ": scores.mean_dice},
        "iou": {"organ": pytest.approx((8 / 12 + 0.5 + 1) / 3)},
        "sensitivity": {"organ": pytest.approx((0.8 + 0.6) / 2)},  # over the two cases that have the organ
        "ppv": {"organ": pytest.approx((0.8 + 0.75) / 2)},
        "specificity": {"organ": pytest.approx((6 / 8 + 6 / 8 + 1) / 3)},
        "hd95_penalty_mm": HD95_PENALTY_MM,
    }


def test_the_spacing_of_the_files_reaches_its_axes(tmp_path: Path) -> None:
    # x, y, z are 0.5, 2 and 7 mm; a plane of y moved by one, then a plane of x.
    for case, axis in {"y": 1, "x": 2}.items():
        for folder, at in {"p": 1, "r": 2}.items():
            labels = np.zeros((4, 5, 6))
            labels[tuple(at if a == axis else slice(None) for a in range(3))] = 1
            write(tmp_path / folder / f"{case}.nii.gz", labels, spacing=(0.5, 2, 7))
    scores = evaluate_folder(tmp_path / "p", tmp_path / "r", ORGAN)
    assert {case: labels["organ"]["hd95"] for case, labels in scores.per_case.items()} == pytest.approx(
        {"y": 2, "x": 0.5}
    )


def test_a_label_that_no_reference_has_leaves_its_sensitivity_open(tmp_path: Path) -> None:
    for folder in ("p", "r"):
        write(tmp_path / folder / "a.nii.gz", np.zeros((1, 3, 6)))
    summary = evaluate_folder(tmp_path / "p", tmp_path / "r", ORGAN).summary()
    assert summary["sensitivity"] == summary["ppv"] == {"organ": None}
    json.dumps(summary, allow_nan=False)


def test_mean_dice_is_the_mean_over_labels(tmp_path: Path) -> None:
    write(tmp_path / "p" / "a.nii.gz", np.array([[[1, 1, 2, 0]]]))
    write(tmp_path / "r" / "a.nii.gz", np.array([[[1, 1, 0, 2]]]))
    scores = evaluate_folder(tmp_path / "p", tmp_path / "r", {"labels": {"background": 0, "x": 1, "y": 2}})
    assert (scores.means["dice"], scores.mean_dice) == ({"x": 1.0, "y": 0.0}, 0.5)


def test_written_files(folders: tuple[Path, Path], tmp_path: Path) -> None:
    as_json, as_csv = write_scores(evaluate_folder(*folders, ORGAN), tmp_path / "out")
    content = json.loads(as_json.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert [row["case"] for row in content["per_case"]] == ["a", "b", "c"]
    assert content["per_case"][2]["ppv"] is None
    rows = list(csv.reader(as_csv.read_text().splitlines()))
    scores = ["dice", "iou", "sensitivity", "ppv", "specificity", "hd95"]
    assert rows[0] == ["case", "label", *scores, "tp", "fp", "fn", "tn"]
    assert rows[1][:2] == ["a", "organ"]
    assert [float(v) for v in rows[1][2:7]] == pytest.approx([0.8, 8 / 12, 0.8, 0.8, 6 / 8])
    assert rows[1][8:] == ["8", "2", "2", "6"]
    assert rows[3] == ["c", "organ", "1.0", "1.0", "", "", "1.0", "0.0", "0", "0", "0", "18"]
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
