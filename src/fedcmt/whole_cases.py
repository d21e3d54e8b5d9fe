"""Scores of an exported model on whole cases of the site's own data, as `Inference.py` gives them."""

import logging
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fedcmt.config import SiteConfig
from fedcmt.data.checks import list_cases, read_dataset_json
from fedcmt.data.classes import UNKNOWN, CaseClasses
from fedcmt.evaluation.metrics import evaluate_folder, write_scores
from fedcmt.evaluation.regions import with_score_regions
from fedcmt.nnunet.classify import classify_folder, model_classes, write_classification
from fedcmt.nnunet.predict import predict_folder
from fedcmt.progress import Progress

logger = logging.getLogger(__name__)


class WholeCases:
    """Predicts and scores; rows of cases stay in the model folder, and only means are returned.

    Args:
      name: The site's name.
      config: The site's.
      classes: The class of every case of a site that classifies; None for a site that segments.
      model_folder: The exported model; predictions go into its ``predictions/images<split>``.
      dataset: The site's data set in nnU-Net raw form.
      scratch: Folder for temporary links.
    """

    def __init__(
        self,
        name: str,
        config: SiteConfig,
        classes: CaseClasses | None,
        model_folder: Path,
        dataset: Path,
        scratch: Path,
    ) -> None:
        self._name = name
        self._config = config
        self._classes = classes
        self._model_folder = model_folder
        self._dataset = dataset
        self._dataset_json = read_dataset_json(dataset)
        self._scratch = scratch

    def labelled(self, split: str) -> list[str]:
        """Cases of ``images<split>`` with a reference: all of them where there is ``labels<split>``, or those of known
        class."""
        needed = f"labels{split}" if self._classes is None else f"images{split}"
        ending = self._dataset_json["file_ending"]
        if not (self._dataset / needed).is_dir() or not any((self._dataset / f"images{split}").glob(f"*{ending}")):
            return []
        cases = list_cases(self._dataset, self._dataset_json, images=f"images{split}")
        return [case for case in cases if self._classes is None or self._classes.cases[case] != UNKNOWN]

    def scores(self, split: str, cases: Sequence[str]) -> dict[str, Any]:
        """Mean scores of some cases of ``images<split>``, without a case's name."""
        files = list_cases(self._dataset, self._dataset_json, images=f"images{split}")
        with tempfile.TemporaryDirectory(dir=self._scratch) as temporary:
            images, labels = Path(temporary, "images"), Path(temporary, "labels")
            _link(images, [file for case in cases for file in files[case]])
            if self._classes is not None:
                return self._classified(split, images, self._classes)
            ending = self._dataset_json["file_ending"]
            _link(labels, [self._dataset / f"labels{split}" / f"{case}{ending}" for case in cases])
            return self._segmented(split, images, labels)

    def _segmented(self, split: str, images: Path, labels: Path) -> dict[str, Any]:
        output = self._output(split)
        predict_folder(self._model_folder, images, output, **self._how(split))
        scored = with_score_regions(self._dataset_json, self._config.score_regions, f"site {self._name!r}")
        scores = evaluate_folder(output, labels, scored, scored["file_ending"])
        write_scores(scores, output)
        return scores.summary()

    def _classified(self, split: str, images: Path, classes: CaseClasses) -> dict[str, Any]:
        probabilities = classify_folder(self._model_folder, images, **self._how(split))
        names = model_classes(self._model_folder)
        scores = write_classification(self._output(split), probabilities, names, classes)
        assert scores is not None  # classes are given
        return scores.summary()

    def _output(self, split: str) -> Path:
        return self._model_folder / "predictions" / f"images{split}"

    def _how(self, split: str) -> Mapping[str, Any]:
        progress = Progress(f"{self._name}: predicting images{split}", logger)
        return {
            "device": site_device(self._config),
            "mirroring": self._config.mirroring,
            "progress": progress.update,
        }


def site_device(config: SiteConfig) -> torch.device:
    """Where a site trains and predicts."""
    if config.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(config.device)


def _link(folder: Path, files: Sequence[Path]) -> None:
    folder.mkdir()
    for file in files:
        (folder / file.name).symlink_to(file.resolve())
