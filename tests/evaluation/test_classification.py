import csv
import json
from pathlib import Path

import pytest

from fedcmt.data.classes import CaseClasses
from fedcmt.evaluation.classification import read_probabilities, score_classes, write_probabilities
from fedcmt.evaluation.metrics import EvaluationError

# True classes x, x, x, x, y, z; predicted x, x, y, x, y, x.
THREE = CaseClasses(("x", "y", "z"), {"a": 0, "b": 0, "c": 0, "d": 0, "e": 1, "f": 2, "unknown": -1, "unseen": 1})
PROBABILITIES = {
    "a": (0.8, 0.1, 0.1),
    "b": (0.6, 0.3, 0.1),
    "c": (0.2, 0.5, 0.3),
    "d": (0.4, 0.4, 0.2),
    "e": (0.1, 0.7, 0.2),
    "f": (0.5, 0.1, 0.4),
}
TWO = CaseClasses(("no", "yes"), {"a": 0, "b": 0, "c": 1, "d": 1})


def test_scores_of_three_classes() -> None:
    scores = score_classes(PROBABILITIES, THREE)
    assert scores.confusion == [[3, 1, 0], [0, 1, 0], [1, 0, 0]]
    assert scores.cases == 6
    assert scores.accuracy == pytest.approx(4 / 6)
    assert scores.balanced_accuracy == pytest.approx((3 / 4 + 1 + 0) / 3)
    # x: of 4 x 2 pairs, e is below all of a b c d, f only below a and b: 6 of 8. y: e above all. z: f above all.
    assert scores.auc == pytest.approx((6 / 8 + 1 + 1) / 3)


def test_auc_of_two_classes_is_class_one_s() -> None:
    # The two of class 1 have 0.2 and 0.9, the others 0.4 and 0.1: 3 of 4 pairs are in order.
    probabilities = {"a": (0.6, 0.4), "b": (0.9, 0.1), "c": (0.8, 0.2), "d": (0.1, 0.9)}
    scores = score_classes(probabilities, TWO)
    assert scores.auc == pytest.approx(3 / 4)
    assert scores.confusion == [[2, 0], [1, 1]]


def test_auc_of_two_classes_is_not_blurred_by_what_rounds_to_one() -> None:
    # Apart in class 1, equal in class 0, where the area would be 1/2.
    assert score_classes({"a": (1.0, 1e-9), "c": (1.0, 2e-9)}, TWO).auc == 1.0


def test_equal_probabilities_give_half_a_pair() -> None:
    assert score_classes({"a": (0.5, 0.5), "c": (0.5, 0.5)}, TWO).auc == 0.5


def test_auc_leaves_out_classes_without_cases() -> None:
    # z does not occur; x and y are apart.
    scores = score_classes({"a": (0.7, 0.2, 0.1), "e": (0.1, 0.2, 0.7)}, THREE)
    assert scores.auc == pytest.approx((1 + 0.5) / 2)
    assert scores.balanced_accuracy == pytest.approx((1 + 0) / 2)
    assert scores.confusion == [[1, 0, 0], [0, 0, 1], [0, 0, 0]]


def test_auc_is_none_where_one_class_alone_occurs() -> None:
    assert score_classes({"a": (0.7, 0.3), "b": (0.2, 0.8)}, TWO).auc is None
    assert score_classes({"a": (0.7, 0.2, 0.1)}, THREE).auc is None


def test_cases_of_unknown_class_are_left_out() -> None:
    assert score_classes({**PROBABILITIES, "unknown": (0.0, 0.0, 1.0)}, THREE) == score_classes(PROBABILITIES, THREE)


def test_the_summary_is_json_and_names_no_case() -> None:
    scores = score_classes({"patient_7": (0.7, 0.3)}, CaseClasses(("no", "yes"), {"patient_7": 0}))
    summary = json.loads(json.dumps(scores.summary(), allow_nan=False))
    assert summary == {
        "cases": 1,
        "accuracy": 1.0,
        "balanced_accuracy": 1.0,
        "auc": None,
        "classes": ["no", "yes"],
        "confusion": [[1, 0], [0, 0]],
    }


@pytest.mark.parametrize(
    ("probabilities", "message"),
    [
        ({"stranger": (0.5, 0.5)}, "1 predicted cases have no entry .*: stranger"),
        ({"a": (0.2, 0.3, 0.5)}, r"case a: 3 probabilities for the 2 classes \['no', 'yes'\]"),
        ({"a": (0.5, 0.4)}, r"case a: \[0\.5, 0\.4\] are no probabilities"),
        ({"a": (1.5, -0.5)}, "case a: .* in .0, 1. that sum to 1"),
        ({"a": (float("nan"), 0.5)}, "case a: .*nan"),
        ({}, "none of the 0 predicted cases has a known class"),
    ],
)
def test_what_cannot_be_scored_is_refused(probabilities: dict, message: str) -> None:
    with pytest.raises(EvaluationError, match=message):
        score_classes(probabilities, TWO)


def test_no_known_class_is_refused() -> None:
    with pytest.raises(EvaluationError, match="none of the 1 predicted cases has a known class"):
        score_classes({"unknown": (0.2, 0.3, 0.5)}, THREE)


def test_written_probabilities_come_back_unchanged(tmp_path: Path) -> None:
    rows = {"a": [1 / 3, 2 / 3], "b": [0.5, 0.5], "c": [1.0, 1e-17]}
    path = tmp_path / "new" / "probabilities.csv"
    write_probabilities(path, rows, ("no, not", "yes"))
    assert read_probabilities(path) == (("no, not", "yes"), rows)
    with path.open(newline="") as file:
        table = list(csv.reader(file))
    assert table[0] == ["case", "predicted", "no, not", "yes"]
    assert [row[:2] for row in table[1:]] == [["a", "yes"], ["b", "no, not"], ["c", "no, not"]]
    assert list(path.parent.iterdir()) == [path]


def test_nothing_is_written_over_a_good_file_when_a_row_is_bad(tmp_path: Path) -> None:
    path = tmp_path / "probabilities.csv"
    write_probabilities(path, {"a": (0.25, 0.75)}, TWO.names)
    with pytest.raises(EvaluationError, match="case b"):
        write_probabilities(path, {"a": (1.0, 0.0), "b": (2.0, 3.0)}, TWO.names)
    assert read_probabilities(path)[1] == {"a": [0.25, 0.75]}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"the columns are \[\]; expected case, predicted"),
        ("case,label\n", r"the columns are \['case', 'label'\]"),
        ("case,predicted,x,y\na,x,0.6\n", "line 2: case a: 1 probabilities for the 2 classes"),
        ("case,predicted,x,y\na,x,0.6,0.4\nb,x,0.6,much\n", "line 3: .*much"),
        ("case,predicted,x,y\na\n", "line 2: not enough values"),
        ("case,predicted,x,y\na,x,0.6,0.4\na,x,0.6,0.4\n", "2 lines for 1 cases"),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "probabilities.csv"
    path.write_text(text)
    with pytest.raises(EvaluationError, match=rf"probabilities\.csv: {message}"):
        read_probabilities(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match=r"probabilities\.csv: file not found"):
        read_probabilities(tmp_path / "probabilities.csv")
