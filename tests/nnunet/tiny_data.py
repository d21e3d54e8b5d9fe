"""Writes tiny data sets in nnU-Net raw form."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import SimpleITK as sitk

Geometry = tuple[tuple[int, int, int], tuple[float, float, float]]
"""Shape in voxels and spacing in mm, both (z, y, x)."""


def geometries(count: int, shape: tuple[int, int, int], spacing: tuple[float, float, float]) -> list[Geometry]:
    """Cases whose axes vary independently, on whole voxels and thousandths of a mm."""
    rng = np.random.default_rng(count)
    shapes = np.array(shape) + rng.integers(-3, 4, (count, 3))
    spacings = np.round(np.array(spacing) * rng.uniform(0.9, 1.1, (count, 3)), 3)
    return [
        (tuple(map(int, s)), tuple(map(float, p)))  # type: ignore[misc]
        for s, p in zip(shapes, spacings, strict=True)
    ]


def write_dataset(
    folder: Path,
    cases: Sequence[Geometry],
    *,
    channels: Sequence[str] = ("T1",),
    labels: Mapping[str, int | list[int]] | None = None,
    margin: int = 2,
    first: int = 0,
) -> Path:
    """Noise with a labelled box in the middle and ``margin`` slices of zeros at the low end of axis z.

    Cases are numbered from ``first`` and their voxels depend only on the number, so parts equal their whole.
    """
    (folder / "imagesTr").mkdir(parents=True)
    (folder / "labelsTr").mkdir()
    for number, (shape, spacing) in enumerate(cases, start=first):
        rng = np.random.default_rng(1000 + number)
        for channel, name in enumerate(channels):
            low, high = (-900.0, 900.0) if name == "CT" else (1.0, 50.0 * (1 + channel + number % 3))
            image = rng.uniform(low, high, shape).astype(np.float32)
            image[:margin] = 0
            _write(image, spacing, folder / "imagesTr" / f"case{number:03d}_{channel:04d}.nii.gz")
        segmentation = np.zeros(shape, np.uint8)
        z, y, x = (s // 4 for s in shape)
        segmentation[z + margin : -z, y:-y, x:-x] = 1
        segmentation[z + margin : -z, y:-y, x : 2 * x] = 2
        _write(segmentation, spacing, folder / "labelsTr" / f"case{number:03d}.nii.gz")
    write_dataset_json(folder, channels, labels or {"background": 0, "a": 1, "b": 2}, len(cases))
    return folder


def write_dataset_json(
    folder: Path, channels: Sequence[str], labels: Mapping[str, int | list[int]], count: int
) -> None:
    """The data set's dataset.json."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "channel_names": {str(i): name for i, name in enumerate(channels)},
        "labels": dict(labels),
        "numTraining": count,
        "file_ending": ".nii.gz",
    }
    (folder / "dataset.json").write_text(json.dumps(content))


def pool(folder: Path, parts: Sequence[Path]) -> Path:
    """One data set of links to all cases of other ones."""
    for name in ("imagesTr", "labelsTr"):
        (folder / name).mkdir(parents=True)
        for path in (path for part in parts for path in sorted((part / name).iterdir())):
            (folder / name / path.name).symlink_to(path.resolve())
    content = json.loads((parts[0] / "dataset.json").read_text())
    count = len(list((folder / "labelsTr").iterdir()))
    write_dataset_json(folder, list(content["channel_names"].values()), content["labels"], count)
    return folder


def _write(array: np.ndarray, spacing: tuple[float, float, float], path: Path) -> None:
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(spacing[::-1])
    sitk.WriteImage(image, str(path))
