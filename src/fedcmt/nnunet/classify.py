"""Class probabilities of a folder of images from an exported classifier, and the files that hold them.

The network runs over the whole preprocessed image as for segmentation; its logit maps are pooled there, at the spacing
the network was trained at.
"""

import csv
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

from fedcmt.data.classes import CaseClasses
from fedcmt.evaluation.classification import ClassScores, score_classes, write_probabilities
from fedcmt.json_file import JsonFileError, read_json, write_json
from fedcmt.models.pooling import log_sum_exp_pool
from fedcmt.nnunet.export import CLASSES_FILE
from fedcmt.nnunet.predict import PredictionInputError, check_images, check_model, load_predictor, read_cases

PROBABILITIES_FILE = "probabilities.csv"


def classify_folder(
    model_folder: Path,
    images: Path,
    *,
    device: torch.device,
    checkpoint: str = "checkpoint_final.pth",
    mirroring: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, list[float]]:
    """Classify every case of a folder.

    Logit maps come from nnU-Net's sliding window with its default settings (half-patch steps, Gaussian weights, mean
    over mirrored inputs), are pooled over the whole image, and go through a softmax. Everything is checked before the
    first case.

    Args:
      model_folder: Holds ``plans.json``, ``dataset.json``, ``classes.json`` and ``fold_all/<checkpoint>``, as
        `export_model_folder` writes them. The checkpoint is unpickled: load only models you trust.
      images: Files ``<case>_0000.nii.gz``, one per channel (the ending is dataset.json's ``file_ending``).
      device: Where to run. On CUDA nnU-Net also sets cuDNN's benchmark mode.
      checkpoint: File name.
      mirroring: Average over mirrored inputs along the axes the checkpoint allows; slower (8 times in 3d).
      progress: Called with (cases done, cases in all), at first with 0.

    Returns:
      Case to a probability per class, in [0, 1] with sum 1, in the order of `model_classes`.

    Raises:
      DatasetError: If there are no images, or a case lacks a channel or has one too many; names the files.
      PredictionInputError: If the model folder lacks a file or one is broken, the model segments or is a cascade, or an
        image cannot be read in full or does not fit the other channels of its case.
    """
    dataset_json = check_model(model_folder, checkpoint)
    sharpness = _read_classes_file(model_folder)["sharpness"]
    cases = check_images(images, dataset_json)
    predictor = load_predictor(model_folder, checkpoint, device=device, mirroring=mirroring)
    return {
        case: _probabilities(_logit_maps(predictor, image, properties), sharpness)
        for case, image, properties in read_cases(predictor, cases, progress)
    }


def model_classes(model_folder: Path) -> tuple[str, ...]:
    """The class names of a classifier in the order of its probabilities.

    Raises:
      PredictionInputError: If the folder is a segmentation model's, or its classes.json is broken.
    """
    return tuple(_read_classes_file(model_folder)["classes"])


def write_classification(
    folder: Path, probabilities: Mapping[str, Sequence[float]], names: Sequence[str], classes: CaseClasses | None
) -> ClassScores | None:
    """Write ``probabilities.csv`` and, where true classes are given, ``metrics.json`` and ``metrics.csv``.

    Args:
      folder: Created if needed.
      probabilities: What `classify_folder` gives.
      names: The model's class names.
      classes: True classes of the same names; None for no scores.

    Returns:
      The scores; None without ``classes``. metrics.json holds their summary, metrics.csv the same in one row, with a
      column per cell of the confusion matrix.

    Raises:
      EvaluationError: As in `score_classes`.
    """
    write_probabilities(folder / PROBABILITIES_FILE, probabilities, names)
    if classes is None:
        return None
    scores = score_classes(probabilities, classes)
    write_json(folder / "metrics.json", scores.summary(), indent=2)
    _write_row(folder / "metrics.csv", _row(scores))
    return scores


def _read_classes_file(model_folder: Path) -> dict[str, Any]:
    path = model_folder / CLASSES_FILE
    if not path.is_file():
        raise PredictionInputError(
            f"{path}: missing; {model_folder} holds a segmentation model. Use predict_folder, or restore the file."
        )
    try:
        content = read_json(path)
    except JsonFileError as error:
        raise PredictionInputError(f"{error}. Restore the model folder.") from error
    if sorted(content) != ["classes", "sharpness"]:
        raise PredictionInputError(
            f"{path}: keys {sorted(content)}; expected 'classes' and 'sharpness'. Restore the model folder."
        )
    return content


def _logit_maps(predictor: nnUNetPredictor, image: np.ndarray, properties: dict) -> torch.Tensor:
    """[K, *spatial] of the preprocessed image, on the CPU."""
    preprocessor = predictor.configuration_manager.preprocessor_class(verbose=False)
    data, _, _ = preprocessor.run_case_npy(
        image, None, properties, predictor.plans_manager, predictor.configuration_manager, predictor.dataset_json
    )
    return predictor.predict_logits_from_preprocessed_data(torch.as_tensor(data))


def _probabilities(logit_maps: torch.Tensor, sharpness: float) -> list[float]:
    return torch.softmax(log_sum_exp_pool(logit_maps[None], sharpness)[0], dim=0).tolist()


def _row(scores: ClassScores) -> dict[str, Any]:
    cells = {
        f"{true} as {predicted}": scores.confusion[i][j]
        for i, true in enumerate(scores.names)
        for j, predicted in enumerate(scores.names)
    }
    means = {key: getattr(scores, key) for key in ("cases", "accuracy", "balanced_accuracy", "auc")}
    return {**means, **cells}


def _write_row(path: Path, row: Mapping[str, Any]) -> None:
    temporary = path.with_name(f".{path.name}.partial")
    with temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(row))
        writer.writeheader()
        writer.writerow(row)
    temporary.replace(path)
