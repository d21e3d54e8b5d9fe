"""A whole job over labels and regions that say of half of each image that nobody knows."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from tests.e2e.conftest import SMALLEST, launch, two_small_datasets

IGNORE = 4
REGIONS = {"whole_tumor": lambda labels: labels > 0, "enhancing_tumor": lambda labels: labels == 3}
LABELS = {"edema": lambda labels: labels == 1, "core": lambda labels: labels == 2}


def with_ignore(dataset: Path, labels: dict[str, int] | None) -> None:
    """Hide the upper half of every label image; ``labels`` in place of the data set's regions, if given."""
    content = json.loads((dataset / "dataset.json").read_text())
    if labels is not None:
        content["labels"] = labels
        del content["regions_class_order"]
    content["labels"]["ignore"] = IGNORE
    (dataset / "dataset.json").write_text(json.dumps(content))
    for path in [*(dataset / "labelsTr").iterdir(), *(dataset / "labelsTs").iterdir()]:
        image = sitk.ReadImage(path)
        values = sitk.GetArrayFromImage(image)
        values[len(values) // 2 :] = IGNORE
        hidden = sitk.GetImageFromArray(values)
        hidden.CopyInformation(image)
        sitk.WriteImage(hidden, path)


def dice(truth: np.ndarray, predicted: np.ndarray, of: Callable[[np.ndarray], np.ndarray]) -> float:
    known = truth != IGNORE
    a, b = of(truth) & known, of(predicted) & known
    return 2 * (a & b).sum() / (a.sum() + b.sum()) if (a | b).any() else 1.0


def test_voxels_to_ignore_are_neither_learned_nor_scored(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    two_small_datasets(raw)
    with_ignore(raw / "Dataset801_North", None)
    with_ignore(raw / "Dataset802_South", {"background": 0, "edema": 1, "core": 2, "enhancing": 3})
    options = [*SMALLEST, "--rounds", "2", "--engine", "inprocess"]
    extra = {"nnUNet_raw": str(raw), "nnUNet_preprocessed": str(tmp_path / "preprocessed")}
    run = launch(tmp_path / "w", "brats_sdl", *options, extra=extra)
    assert run.code == 0, run.output
    for site, asked in (("client1", REGIONS), ("client2", LABELS)):
        report = run.results["sites"][site]
        (predicted,) = (Path(report["model_folder"]) / "predictions" / "imagesTs").glob("*.nii.gz")
        truth = sitk.GetArrayFromImage(sitk.ReadImage(raw / report["dataset"] / "labelsTs" / predicted.name))
        found = sitk.GetArrayFromImage(sitk.ReadImage(predicted))
        assert IGNORE in truth
        assert 0 < found.max() < IGNORE
        for name, of in asked.items():
            assert report["test"]["dice"][name] == pytest.approx(dice(truth, found, of)), name
