"""Scores of whole-image classification: accuracy, balanced accuracy, area under the ROC curve, confusion matrix.

Case names stay in what `write_probabilities` writes, which is for the site's own disk; `ClassScores.summary` holds no
case and may be reported.
"""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import numpy as np
from sklearn.metrics import confusion_matrix, recall_score, roc_auc_score

from fedcmt.data.classes import UNKNOWN, CaseClasses
from fedcmt.evaluation.metrics import EvaluationError

_SUM_TOLERANCE = 1e-4
"""Above float32's rounding, below what a missing class would take away."""


@dataclass(frozen=True)
class ClassScores:
    """Scores of classified cases.

    Attributes:
      names: Class names in the order of their indices.
      cases: Number of cases counted, those of a known class.
      accuracy: Fraction of cases whose most probable class is the true one: trace / sum of ``confusion``.
      balanced_accuracy: Mean over the classes that occur of the fraction of their cases that is right.
      auc: With two classes of class 1; with more the mean, over the classes that some cases are of and others are not,
        of each class against the rest. None if there is no such class.
      confusion: Cases by true class (rows) and predicted class (columns).
    """

    names: tuple[str, ...]
    cases: int
    accuracy: float
    balanced_accuracy: float
    auc: float | None
    confusion: list[list[int]]

    def summary(self) -> dict:
        """All of it, JSON-able, without case names."""
        return {
            "cases": self.cases,
            "accuracy": self.accuracy,
            "balanced_accuracy": self.balanced_accuracy,
            "auc": self.auc,
            "classes": list(self.names),
            "confusion": [list(row) for row in self.confusion],
        }


def score_classes(probabilities: Mapping[str, Sequence[float]], classes: CaseClasses) -> ClassScores:
    """Score predictions against the cases' classes; cases whose class is not known are left out.

    Args:
      probabilities: Case id to one probability per class, in [0, 1], summing to 1. The predicted class is the most
        probable one, the first of equals.
      classes: The true classes; may hold more cases.

    Raises:
      EvaluationError: If a case is not in ``classes``, its probabilities are no distribution over the classes, or no
        case of known class is left.
    """
    if unknown := sorted(set(probabilities) - set(classes.cases)):
        raise EvaluationError(
            f"{len(unknown)} predicted cases have no entry in the data set's classes: {', '.join(unknown[:5])}. Were "
            "they made from other images?"
        )
    for case, row in probabilities.items():
        _check_distribution(case, row, classes.names)
    known = [case for case in probabilities if classes.cases[case] != UNKNOWN]
    if not known:
        raise EvaluationError(f"none of the {len(probabilities)} predicted cases has a known class; nothing to score.")
    truth = np.array([classes.cases[case] for case in known])
    scores = np.array([probabilities[case] for case in known], dtype=float)
    predicted = scores.argmax(axis=1)
    confusion = confusion_matrix(truth, predicted, labels=range(len(classes.names)))
    return ClassScores(
        names=classes.names,
        cases=len(known),
        accuracy=float(np.trace(confusion) / confusion.sum()),
        balanced_accuracy=float(recall_score(truth, predicted, labels=np.unique(truth), average="macro")),
        auc=_auc(truth, scores),
        confusion=confusion.tolist(),
    )


def write_probabilities(path: Path, probabilities: Mapping[str, Sequence[float]], names: Sequence[str]) -> None:
    """Write ``case,predicted,<name>,...``, one line per case with the predicted class's name; whole or not at all.

    Raises:
      EvaluationError: If a case's probabilities are no distribution over the classes. Nothing is written then.
    """
    for case, row in probabilities.items():
        _check_distribution(case, row, names)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid4().hex}.partial")
    try:
        with temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["case", "predicted", *names])
            for case, row in probabilities.items():
                writer.writerow([case, names[int(np.argmax(row))], *(float(value) for value in row)])
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read_probabilities(path: Path) -> tuple[tuple[str, ...], dict[str, list[float]]]:
    """Read what `write_probabilities` wrote: the class names, and case id to probabilities.

    Raises:
      EvaluationError: If there is no such file or it is another one, or a line is damaged or comes twice.
    """
    if not path.is_file():
        raise EvaluationError(f"{path}: file not found. Predict first.")
    with path.open(newline="", encoding="utf-8") as file:
        header, *rows = list(csv.reader(file)) or [[]]
    if header[:2] != ["case", "predicted"]:
        raise EvaluationError(f"{path}: the columns are {header}; expected case, predicted and the classes.")
    names, probabilities = tuple(header[2:]), {}
    for number, row in enumerate(rows, start=2):
        try:
            case, _, *values = row
            probabilities[case] = [float(value) for value in values]
            _check_distribution(case, probabilities[case], names)
        except ValueError as error:
            raise EvaluationError(f"{path}: line {number}: {error} Predict again.") from error
    if len(probabilities) != len(rows):
        raise EvaluationError(f"{path}: {len(rows)} lines for {len(probabilities)} cases; each may come once.")
    return names, probabilities


def _check_distribution(case: str, row: Sequence[float], names: Sequence[str]) -> None:
    if len(row) != len(names):
        raise EvaluationError(f"case {case}: {len(row)} probabilities for the {len(names)} classes {list(names)}.")
    values = np.asarray(row, dtype=float)
    inside = bool(((values >= 0) & (values <= 1)).all())  # false for NaN too
    if not inside or abs(values.sum() - 1) > _SUM_TOLERANCE:
        raise EvaluationError(
            f"case {case}: {values.tolist()} are no probabilities; expected values in [0, 1] that sum to 1. "
            "Logits need a softmax first."
        )


def _auc(truth: np.ndarray, scores: np.ndarray) -> float | None:
    """``truth`` [cases] class indices, ``scores`` [cases, classes]."""
    candidates = [1] if scores.shape[1] == 2 else range(scores.shape[1])
    defined = [index for index in candidates if 0 < np.count_nonzero(truth == index) < len(truth)]
    areas = [roc_auc_score(truth == index, scores[:, index]) for index in defined]
    return float(np.mean(areas)) if areas else None
