"""Scores of regions where data sets and label maps have plain labels, by hand on tiny label maps."""

from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from fedcmt.evaluation.metrics import EvaluationError, case_scores, evaluate_folder
from fedcmt.evaluation.regions import is_regions, with_score_regions

# BraTS: 1 necrotic or non-enhancing core, 2 oedema, 3 enhancing tumour.
PLAIN = {"labels": {"background": 0, "core": 1, "oedema": 2, "enhancing": 3}, "file_ending": ".nii.gz"}
NESTED = {"WT": [1, 2, 3], "TC": [1, 3], "ET": [3]}


@pytest.mark.parametrize(
    ("prediction", "reference", "dice"),
    [
        ([0, 0, 0], [0, 0, 0], {"WT": 1, "TC": 1, "ET": 1}),
        ([0, 3, 0], [0, 0, 0], {"WT": 0, "TC": 0, "ET": 0}),
        ([0, 1, 1], [0, 1, 1], {"WT": 1, "TC": 1, "ET": 1}),
        ([0, 1, 1], [0, 0, 0], {"WT": 0, "TC": 0, "ET": 1}),
        ([0, 2, 2], [0, 0, 0], {"WT": 0, "TC": 1, "ET": 1}),
        ([3, 1, 2], [1, 2, 0], {"WT": 0.8, "TC": 2 / 3, "ET": 0}),
    ],
    ids=["both empty", "only predicted", "core alone", "core counts in WT and TC", "oedema in WT alone", "by hand"],
)
def test_oracle_25_dice_of_brats_regions_of_plain_labels(
    prediction: list[int], reference: list[int], dice: dict[str, float]
) -> None:
    scored = with_score_regions(PLAIN, NESTED, "site 'c1'")
    scores = case_scores(np.array([prediction]), np.array([reference]), scored, (1, 1))
    assert {region: own["dice"] for region, own in scores.items()} == pytest.approx(dice)


def test_every_score_is_of_the_union() -> None:
    prediction, reference = np.array([[1, 3, 2, 0, 0]]), np.array([[3, 1, 0, 1, 0]])
    scored = with_score_regions(PLAIN, {"TC": [1, 3]}, "site 'c1'")
    scores = case_scores(prediction, reference, scored, (1, 2))["TC"]
    # The prediction's core is voxels 0 and 1, the reference's 0, 1 and 3, which is 2 voxels of 2 mm from 1.
    assert (scores["tp"], scores["fp"], scores["fn"], scores["tn"]) == (2, 0, 1, 2)
    assert (scores["iou"], scores["sensitivity"], scores["ppv"]) == pytest.approx((2 / 3, 2 / 3, 1))
    assert scores["hd95"] == pytest.approx(0.9 * 4)  # the 95th percentile of 0, 0 and 4


def test_mean_dice_is_the_mean_of_the_regions(tmp_path: Path) -> None:
    for folder, labels in {"p": [3, 1, 2, 0], "r": [1, 2, 0, 0]}.items():
        (tmp_path / folder).mkdir()
        image = sitk.GetImageFromArray(np.array([[labels]], np.uint8))
        sitk.WriteImage(image, str(tmp_path / folder / "a.nii.gz"))
    scores = evaluate_folder(tmp_path / "p", tmp_path / "r", with_score_regions(PLAIN, NESTED, "site 'c1'"))
    assert scores.means["dice"] == pytest.approx({"WT": 0.8, "TC": 2 / 3, "ET": 0})
    assert scores.mean_dice == pytest.approx((0.8 + 2 / 3) / 3)


def test_without_regions_labels_are_scored() -> None:
    assert with_score_regions(PLAIN, {}, "site 'c1'") == PLAIN


def test_the_data_set_stays_as_it_is_and_ignored_voxels_count_nowhere() -> None:
    dataset_json = {**PLAIN, "labels": {**PLAIN["labels"], "ignore": 4}}
    scored = with_score_regions(dataset_json, {"any": [1, 2, 3]}, "site 'c1'")
    assert list(dataset_json["labels"]) == ["background", "core", "oedema", "enhancing", "ignore"]
    scores = case_scores(np.array([[1, 1, 0]]), np.array([[2, 4, 0]]), scored, (1, 1))
    assert {name: (s["tp"], s["fp"], s["fn"], s["tn"]) for name, s in scores.items()} == {"any": (1, 0, 0, 1)}


def test_a_data_set_with_regions_of_its_own_is_refused() -> None:
    own = {"labels": {"background": 0, "WT": [1, 2], "ET": 2}}
    with pytest.raises(EvaluationError, match=r"site 'c1': score_regions is .* has regions already \(WT\)"):
        with_score_regions(own, {"whole": [1, 2]}, "site 'c1'")


@pytest.mark.parametrize("absent", [4, 9], ids=["the ignore label", "no label"])
def test_an_id_that_no_label_has_is_refused(absent: int) -> None:
    dataset_json = {"labels": {**PLAIN["labels"], "ignore": 4}}
    expected = rf"site 'c1': score_regions: 'TC' is \[1, {absent}\], .* no label of \[{absent}\]; .* are \[1, 2, 3\]"
    with pytest.raises(EvaluationError, match=expected):
        with_score_regions(dataset_json, {"ET": [3], "TC": [1, absent]}, "site 'c1'")


@pytest.mark.parametrize(
    ("value", "ok"),
    [
        ({}, True),
        ({"WT": [1, 2, 3], "ET": [3]}, True),
        ([["WT", [1]]], False),
        ({"WT": 1}, False),
        ({"WT": []}, False),
        ({"WT": [0, 1]}, False),
        ({"WT": [1, 1]}, False),
        ({"WT": [1.0]}, False),
        ({"WT": [True]}, False),
        ({" ": [1]}, False),
        ({"ignore": [1]}, False),
        ({"background": [1]}, False),
    ],
)
def test_regions_are_names_with_ids_above_0(value: object, ok: bool) -> None:
    assert is_regions(value) is ok
