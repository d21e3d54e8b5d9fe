"""One site's model on a folder of images, with scores where there are references: what `Inference.py` does per site.

References are compared with the images by name before anything is predicted: found out then, not after hours.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from fedcmt.data.checks import list_cases, read_dataset_json
from fedcmt.data.classes import UNKNOWN, CaseClasses, read_classes
from fedcmt.evaluation.metrics import EvaluationError, evaluate_folder, write_scores
from fedcmt.nnunet.classify import classify_folder, model_classes, write_classification
from fedcmt.nnunet.predict import check_model, predict_folder


@dataclass(frozen=True)
class PredictionSettings:
    """How to predict.

    Attributes:
      device: Where to run.
      checkpoint: File name in the model folder's ``fold_all``.
      mirroring: Average over mirrored inputs.
      progress: Called with (cases done, cases in all).
    """

    device: torch.device
    checkpoint: str
    mirroring: bool
    progress: Callable[[int, int], None]


def segment(model: Path, images: Path, output: Path, labels: Path | None, settings: PredictionSettings) -> None:
    """Write label maps, and ``metrics.json`` and ``metrics.csv`` with reference label maps.

    Args:
      model: Model folder.
      images: Folder of images.
      output: Created if needed; what of these files it holds is replaced.
      labels: Folder of reference label maps; None for no scores.
      settings: How to predict.

    Raises:
      DatasetError, PredictionInputError, OSError: As in `predict_folder`.
      EvaluationError: If a reference has no images, or as in `evaluate_folder`.
    """
    dataset_json = check_model(model, settings.checkpoint)
    ending = dataset_json["file_ending"]
    if labels is not None:
        _check_label_maps(labels, ending, _cases(images, dataset_json))
    _discard_scores(output)
    predict_folder(model, images, output, **vars(settings))
    if labels is not None:
        write_scores(evaluate_folder(output, labels, dataset_json, ending), output)


def classify(
    model: Path, images: Path, output: Path, dataset: Path | None, source: str | None, settings: PredictionSettings
) -> None:
    """Write ``probabilities.csv``, and ``metrics.json`` and ``metrics.csv`` where the class of any case is known.

    Args:
      model: Model folder.
      images: Folder of images.
      output: Created if needed; what of these files it holds is replaced.
      dataset: Data set folder that has the cases' classes; None for no scores.
      source: Where it has them, as `read_classes` takes it; None for no scores.
      settings: How to predict.

    Raises:
      DatasetError, PredictionInputError: As in `classify_folder` and `read_classes`.
      EvaluationError: If the classes are not those of the model or lack a case.
    """
    dataset_json, names = check_model(model, settings.checkpoint), model_classes(model)
    cases = _cases(images, dataset_json)
    classes = None if dataset is None or source is None else _true_classes(dataset, source, names, cases)
    _discard_scores(output)
    probabilities = classify_folder(model, images, **vars(settings))
    write_classification(output, probabilities, names, classes)


def _cases(images: Path, dataset_json: Mapping[str, object]) -> list[str]:
    folder = images.resolve()
    return list(list_cases(folder.parent, dataset_json, images=folder.name))


def _check_label_maps(labels: Path, ending: str, cases: Collection[str]) -> None:
    references = [f.name.removesuffix(ending) for f in labels.glob(f"*{ending}") if not f.name.startswith(".")]
    if not references:
        raise EvaluationError(f"{labels}: no reference label maps (*{ending}). Give the folder that holds them.")
    if lacking := sorted(set(references) - set(cases)):
        raise EvaluationError(
            f"{labels}: {len(lacking)} of {len(references)} references have no images: {', '.join(lacking[:4])}. "
            "Add the images, or give a folder of references without these."
        )


def _true_classes(dataset: Path, source: str, names: Sequence[str], cases: Collection[str]) -> CaseClasses | None:
    """The classes of the cases; None if that of none of them is known."""
    classes = read_classes(dataset, read_dataset_json(dataset), source)
    if classes.names != tuple(names):
        raise EvaluationError(
            f"{dataset}: {source} has the classes {list(classes.names)}, the model {list(names)}. "
            "Score against the classes that the model was trained on."
        )
    if lacking := sorted(set(cases) - set(classes.cases)):
        raise EvaluationError(
            f"{dataset}: {source} has no entry for {len(lacking)} of {len(cases)} cases: {', '.join(lacking[:4])}. "
            "Give the data set folder of these images."
        )
    return classes if any(classes.cases[case] != UNKNOWN for case in cases) else None


def _discard_scores(folder: Path) -> None:
    """Or those of older predictions would stand beside the new ones."""
    for name in ("metrics.json", "metrics.csv"):
        (folder / name).unlink(missing_ok=True)
