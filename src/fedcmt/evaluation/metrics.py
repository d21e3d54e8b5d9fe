"""Overlap scores of label maps: Dice, IoU, sensitivity and positive predictive value, per label or region.

Case names stay in what `FolderScores.to_dict` returns and `write_scores` writes, which is for the site's own disk;
`FolderScores.summary` holds no case and may be reported.
"""

import csv
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from fedcmt.json_file import write_json

_RATIOS = ("dice", "iou", "sensitivity", "ppv")
_COUNTS = ("tp", "fp", "fn")
_GEOMETRY_TOLERANCE = 1e-3  # mm for spacing and origin; NIfTI keeps geometry in float32


class EvaluationError(ValueError):
    """Predictions and references that cannot be compared."""


@dataclass(frozen=True)
class FolderScores:
    """Scores of a folder of predictions.

    Attributes:
      per_case: Case name -> label or region name -> what `case_scores` gives.
      dice: Label or region name -> mean over cases, in [0, 1].
      iou: The same for IoU.
      mean_dice: Mean of ``dice`` over labels.
    """

    per_case: dict[str, dict[str, dict[str, float]]]
    dice: dict[str, float]
    iou: dict[str, float]
    mean_dice: float

    @property
    def cases(self) -> int:
        """Number of cases."""
        return len(self.per_case)

    def summary(self) -> dict:
        """Means only, without case names: ``{cases, mean_dice, dice: {label: value}, iou: {label: value}}``."""
        return {"cases": self.cases, "mean_dice": self.mean_dice, "dice": dict(self.dice), "iou": dict(self.iou)}

    def to_dict(self) -> dict:
        """`summary` and ``per_case``, a row per case and label; JSON-able: an undefined ratio is None, not NaN."""
        return {**self.summary(), "per_case": [{k: _or_none(v) for k, v in row.items()} for row in self._rows()]}

    def _rows(self) -> Iterable[dict]:
        for case, labels in self.per_case.items():
            for label, scores in labels.items():
                yield {"case": case, "label": label, **scores}

    def _mean_rows(self) -> Iterable[dict]:
        for label in self.dice:
            scores = [case[label] for case in self.per_case.values()]
            yield {"case": "mean", "label": label, **{key: _mean(s[key] for s in scores) for key in _RATIOS + _COUNTS}}


def label_masks(dataset_json: Mapping) -> dict[str, tuple[int, ...]]:
    """Name -> label values of each label or region of a dataset.json, in its order, without background and ignore."""
    masks: dict[str, tuple[int, ...]] = {}
    for name, value in dataset_json["labels"].items():
        values = tuple(int(v) for v in value) if isinstance(value, list | tuple) else (int(value),)
        if name != "ignore" and set(values) != {0}:
            masks[name] = values
    return masks


def case_scores(prediction: np.ndarray, reference: np.ndarray, dataset_json: Mapping) -> dict[str, dict[str, float]]:
    """Overlap of one label map with its reference, for each label or region.

    Voxels where the reference holds the ignore label count nowhere. If neither map has the label, Dice and IoU are 1;
    if only one of them has it, they are 0. Sensitivity is NaN for an empty reference, ppv for an empty prediction.

    Args:
      prediction: Integer label map, any shape.
      reference: Integer label map of the same shape.
      dataset_json: nnU-Net's; only ``labels`` is read.

    Returns:
      Name -> ``{dice, iou, sensitivity, ppv, tp, fp, fn}``; ratios in [0, 1] or NaN, counts in voxels.

    Raises:
      EvaluationError: If the shapes differ.
    """
    if prediction.shape != reference.shape:
        raise EvaluationError(
            f"prediction has shape {prediction.shape}, its reference {reference.shape}; they must be equal."
        )
    ignore = dataset_json["labels"].get("ignore")
    if ignore is not None:
        counted = reference != int(ignore)
        prediction, reference = prediction[counted], reference[counted]
    return {
        name: _overlap(np.isin(prediction, values), np.isin(reference, values))
        for name, values in label_masks(dataset_json).items()
    }


def evaluate_folder(
    predictions: Path, references: Path, dataset_json: Mapping, file_ending: str = ".nii.gz"
) -> FolderScores:
    """Score every reference of a folder against the prediction of the same file name.

    Args:
      predictions: Folder of label maps; files without a reference are left out.
      references: Folder of reference label maps.
      dataset_json: nnU-Net's; only ``labels`` is read.
      file_ending: Ending of both, with its dot.

    Raises:
      EvaluationError: If there is no reference, a prediction is missing, a file cannot be read, or size, spacing,
        origin or direction of a pair differ.
    """
    files = sorted(f for f in references.glob(f"*{file_ending}") if not f.name.startswith("."))
    if not files:
        raise EvaluationError(
            f"{references}: no reference label maps (*{file_ending}). Give the folder that holds them."
        )
    missing = [f.name for f in files if not (predictions / f.name).is_file()]
    if missing:
        raise EvaluationError(
            f"{predictions}: {len(missing)} of {len(files)} predictions are missing: {', '.join(missing[:4])}. "
            f"Every reference in {references} needs a prediction of the same name."
        )
    per_case = {
        f.name.removesuffix(file_ending): case_scores(*_read_pair(predictions / f.name, f), dataset_json) for f in files
    }
    dice, iou = (
        {label: _mean(case[label][key] for case in per_case.values()) for label in label_masks(dataset_json)}
        for key in ("dice", "iou")
    )
    return FolderScores(per_case=per_case, dice=dice, iou=iou, mean_dice=_mean(dice.values()))


def write_scores(scores: FolderScores, folder: Path, stem: str = "metrics") -> tuple[Path, Path]:
    """Write ``<stem>.json`` (`FolderScores.to_dict`) and ``<stem>.csv`` (its rows, then one mean row per label).

    A ratio that is undefined is null in the JSON and empty in the CSV, and is left out of its mean.
    """
    as_json, as_csv = folder / f"{stem}.json", folder / f"{stem}.csv"
    write_json(as_json, scores.to_dict(), indent=2)
    temporary = folder / f".{stem}.partial"
    with temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["case", "label", *_RATIOS, *_COUNTS])
        writer.writeheader()
        for row in (*scores._rows(), *scores._mean_rows()):
            writer.writerow({key: _or_none(value) for key, value in row.items()})
    temporary.replace(as_csv)
    return as_json, as_csv


def _overlap(predicted: np.ndarray, true: np.ndarray) -> dict[str, float]:
    """Scores of two boolean masks of one shape."""
    tp = int(np.count_nonzero(predicted & true))
    fp, fn = int(np.count_nonzero(predicted)) - tp, int(np.count_nonzero(true)) - tp
    empty = tp + fp + fn == 0
    return {
        "dice": 1.0 if empty else 2 * tp / (2 * tp + fp + fn),
        "iou": 1.0 if empty else tp / (tp + fp + fn),
        "sensitivity": tp / (tp + fn) if tp + fn else math.nan,
        "ppv": tp / (tp + fp) if tp + fp else math.nan,
        "tp": tp,
        "fp": fp,
        "fn": fn,
    }


def _read_pair(prediction: Path, reference: Path) -> tuple[np.ndarray, np.ndarray]:
    """Both label maps, (z, y, x); raises `EvaluationError` where they do not lie on the same grid."""
    ours, theirs = _read(prediction), _read(reference)
    for what in ("Size", "Spacing", "Origin", "Direction"):
        got, expected = (getattr(image, f"Get{what}")() for image in (ours, theirs))
        if len(got) != len(expected) or not np.allclose(got, expected, rtol=0, atol=_GEOMETRY_TOLERANCE):
            raise EvaluationError(
                f"{prediction}: {what.lower()} {_rounded(got)} differs from {_rounded(expected)} of {reference}. "
                "A prediction must lie on its reference's grid: was it made from this case's images?"
            )
    return sitk.GetArrayFromImage(ours), sitk.GetArrayFromImage(theirs)


def _read(path: Path) -> sitk.Image:
    try:
        return sitk.ReadImage(str(path))
    except RuntimeError as error:
        raise EvaluationError(f"{path}: not a readable image. Restore or remove the file.") from error


def _mean(values: Iterable[float]) -> float:
    """Mean of the values that are defined, NaN if none is."""
    defined = [v for v in values if not math.isnan(v)]
    return float(np.mean(defined)) if defined else math.nan


def _or_none(value: float | str) -> float | str | None:
    return None if isinstance(value, float) and math.isnan(value) else value


def _rounded(values: Iterable[float]) -> tuple[float, ...]:
    return tuple(round(v, 4) for v in values)
