"""One site's model on a folder of images, with scores where there are references: what `Inference.py` does per site.

References are compared with the images by name before anything is predicted: found out then, not after hours.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from fedcmt.data.checks import read_dataset_json
from fedcmt.data.classes import UNKNOWN, CaseClasses, read_classes
from fedcmt.evaluation.metrics import EvaluationError, FolderScores, evaluate_folder, write_scores
from fedcmt.evaluation.regions import with_score_regions
from fedcmt.evaluation.subsets import AS_CSV, AS_MARKDOWN, Subset, folder_name, sequences_of, subsets_of, write_subsets
from fedcmt.nnunet.classify import classify_folder, model_classes, write_classification
from fedcmt.nnunet.predict import check_images, check_model, list_images, predict_folder

_SCORES = ("metrics.json", "metrics.csv")

ScoreRegions = Mapping[str, Sequence[int]]
"""Region name -> label ids to score instead of the model's labels, as `with_score_regions` takes them."""


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


def segment(
    model: Path,
    images: Path,
    output: Path,
    labels: Path | None,
    settings: PredictionSettings,
    sequences: Subset | None = None,
    *,
    score_regions: ScoreRegions | None = None,
) -> None:
    """Write label maps, and ``metrics.json`` and ``metrics.csv`` with reference label maps.

    Args:
      model: Model folder.
      images: Folder of images.
      output: Created if needed; what of these files it holds is replaced.
      labels: Folder of reference label maps; None for no scores.
      settings: How to predict.
      sequences: Those of the model's to go by, as in `predict_folder`; None for all channels.
      score_regions: None to score the model's own labels or regions.

    Raises:
      DatasetError, PredictionInputError, OSError: As in `predict_folder`.
      EvaluationError: If a reference has no images, or as in `evaluate_folder` and `with_score_regions`.
    """
    dataset_json = check_model(model, settings.checkpoint)
    scored = with_score_regions(dataset_json, score_regions or {}, str(model))
    if labels is not None:
        _check_label_maps(labels, dataset_json["file_ending"], list_images(images, dataset_json, sequences))
    _discard(output, _SCORES)
    predict_folder(model, images, output, **vars(settings), sequences=sequences)
    if labels is not None:
        _score(output, labels, scored)


def segment_subsets(
    model: Path,
    images: Path,
    output: Path,
    labels: Path,
    settings: PredictionSettings,
    *,
    score_regions: ScoreRegions | None = None,
) -> None:
    """`segment` from every subset of a model's sequences, with scores, and a table of these.

    Everything is checked before the first subset. ``settings.progress`` counts a case once for each subset.

    Args:
      model: Model folder.
      images: Folder of images with all of the model's channels.
      output: Gets a folder for each subset, named as `folder_name` does, ``subsets.csv`` and ``subsets.md``.
      labels: Folder of reference label maps.
      settings: How to predict.
      score_regions: As in `segment`.

    Raises:
      SubsetError: If a channel of the model is no MR sequence.
      DatasetError, PredictionInputError, EvaluationError, OSError: As in `segment`.
    """
    dataset_json = check_model(model, settings.checkpoint)
    scored = with_score_regions(dataset_json, score_regions or {}, str(model))
    subsets = subsets_of(sequences_of(dataset_json))
    _check_label_maps(labels, dataset_json["file_ending"], check_images(images, dataset_json))
    _discard(output, (AS_CSV, AS_MARKDOWN))
    scores = {}
    for number, subset in enumerate(subsets):
        folder = output / folder_name(images.resolve().name, subset)
        part = replace(settings, progress=_progress_of_part(settings.progress, number, len(subsets)))
        segment(model, images, folder, None, part, subset)
        scores[subset] = _score(folder, labels, scored)
    write_subsets(scores, output)


def _progress_of_part(whole: Callable[[int, int], None], number: int, parts: int) -> Callable[[int, int], None]:
    """Tells how far a sequence of equally long parts is, from within one of them."""

    def report(done: int, total: int) -> None:
        if done or number == 0:  # else it repeats the end of the part before
            whole(number * total + done, parts * total)

    return report


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
    cases = list_images(images, dataset_json)
    classes = None if dataset is None or source is None else _true_classes(dataset, source, names, cases)
    _discard(output, _SCORES)
    probabilities = classify_folder(model, images, **vars(settings))
    write_classification(output, probabilities, names, classes)


def _score(predictions: Path, labels: Path, dataset_json: Mapping) -> FolderScores:
    scores = evaluate_folder(predictions, labels, dataset_json, dataset_json["file_ending"])
    write_scores(scores, predictions)
    return scores


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


def _discard(folder: Path, names: Sequence[str]) -> None:
    """Or those of older predictions would stand beside the new ones."""
    for name in names:
        (folder / name).unlink(missing_ok=True)
