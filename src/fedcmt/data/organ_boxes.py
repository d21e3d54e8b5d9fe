"""A classification data set from a segmentation one: boxes round organs, to be told apart by what they show.

After OrganMNIST3D of Yang et al., MedMNIST v2, Scientific Data 2023, https://arxiv.org/abs/2110.14795, where organs are
cropped by their bounding boxes. Here all boxes have one physical size, so that the size gives no organ away.
"""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk

from fedcmt.data.checks import Case, DatasetError
from fedcmt.json_file import write_json


def write_organ_boxes(
    folder: Path,
    name: str,
    dataset_json: Mapping[str, Any],
    splits: Mapping[str, Mapping[str, Case]],
    box_mm: Sequence[float],
) -> None:
    """Write one case ``PATIENT_ORGAN`` per patient and organ, and which organ it is to ``classes.json``.

    The label image is 1 in the whole box, so that it does not tell the class. An organ that a patient lacks is left
    out; the classes are all labels of ``dataset_json`` in the order of their values.

    Args:
      folder: Where to; must not exist.
      name: The data set's name for its dataset.json.
      dataset_json: The source's.
      splits: ``Tr`` and ``Ts`` to the source's patients to train and to test on.
      box_mm: Edges of a box along the image's axes x, y, z. A box has the nearest whole number of voxels of its
        patient's spacing, so that all have one physical size up to rounding.

    Raises:
      DatasetError: If the source has regions, or an organ's name makes no file name.
    """
    organs = organ_labels(dataset_json)
    class_idx: dict[str, int] = {}
    count = {}
    for split, patients in splits.items():
        for kind in ("images", "labels"):
            (folder / f"{kind}{split}").mkdir(parents=True)
        before = len(class_idx)
        for patient, case in patients.items():
            class_idx |= _write_patient(folder, split, patient, case, organs, box_mm)
        count[split] = len(class_idx) - before
    own = {"labels": {"background": 0, "box": 1}, "name": name, "numTraining": count["Tr"]}
    write_json(folder / "dataset.json", {**dataset_json, **own}, indent=2)
    write_json(folder / "classes.json", {"classes": list(organs), "cases": class_idx}, indent=2)


def organ_labels(dataset_json: Mapping[str, Any]) -> dict[str, int]:
    """Name to value of the labels that are organs, in the order of values: neither background nor ignore.

    Raises:
      DatasetError: If there are regions, or a name makes no file name.
    """
    organs = {name: value for name, value in dataset_json["labels"].items() if name not in ("background", "ignore")}
    if regions := [name for name, value in organs.items() if not isinstance(value, int)]:
        raise DatasetError(
            f"dataset.json: labels {regions} are regions, which may overlap; organ_boxes needs one value per organ. "
            "Use another source."
        )
    if bad := [name for name in organs if not re.fullmatch(r"[\w -]+", name)]:
        raise DatasetError(
            f"dataset.json: labels {bad} cannot be part of a file name. Rename them with letters, digits, _ and -."
        )
    return dict(sorted(organs.items(), key=lambda item: item[1]))


def centred_box(image: sitk.Image, centre_vox: Sequence[int], size_vox: Sequence[int]) -> sitk.Image:
    """Crop a box whose voxels keep their places in space.

    A box that would leave the image is shifted to lie inside. Along an axis where the image is smaller than the box, it
    is padded at both ends with its minimum (air in CT).

    Args:
      image: 3-D.
      centre_vox: Index x, y, z that the box is centred on; of an even number of voxels, the first one past the middle.
      size_vox: Voxels along x, y, z.
    """
    low = [max(0, (size - have) // 2) for size, have in zip(size_vox, image.GetSize(), strict=True)]
    high = [max(0, size - have) - below for size, have, below in zip(size_vox, image.GetSize(), low, strict=True)]
    if any(low) or any(high):
        image = sitk.ConstantPad(image, low, high, float(sitk.GetArrayViewFromImage(image).min()))
    start = [
        min(max(0, centre + below - size // 2), have - size)
        for centre, below, size, have in zip(centre_vox, low, size_vox, image.GetSize(), strict=True)
    ]
    return sitk.RegionOfInterest(image, list(size_vox), start)


def _write_patient(
    folder: Path, split: str, patient: str, case: Case, organs: Mapping[str, int], box_mm: Sequence[float]
) -> dict[str, int]:
    """Write a patient's boxes and return their class indices."""
    images = [sitk.ReadImage(str(path)) for path in case.images]
    labels = sitk.GetArrayFromImage(sitk.ReadImage(str(case.label)))  # [Z, Y, X]
    size_vox = [max(1, round(mm / spacing)) for mm, spacing in zip(box_mm, images[0].GetSpacing(), strict=True)]
    class_idx = {}
    for index, (organ, value) in enumerate(organs.items()):
        voxels = np.argwhere(labels == value)
        if not len(voxels):
            continue
        centre_vox = [round(float(position)) for position in voxels.mean(axis=0)[::-1]]
        name = f"{patient}_{organ}"
        for image, path in zip(images, case.images, strict=True):
            box = centred_box(image, centre_vox, size_vox)
            channel_and_ending = path.name.removeprefix(patient)  # _0000.nii.gz
            _write(box, folder / f"images{split}" / (name + channel_and_ending), path)
        whole = sitk.Image(size_vox, sitk.sitkUInt8) + 1
        whole.CopyInformation(box)
        ending = case.label.name.removeprefix(patient)
        _write(whole, folder / f"labels{split}" / (name + ending), case.label)
        class_idx[name] = index
    return class_idx


def _write(image: sitk.Image, path: Path, source: Path) -> None:
    """Write a file with the time of the one it was cut from: cut again, it is known as the same."""
    sitk.WriteImage(image, str(path), useCompression=True)
    os.utime(path, ns=(source.stat().st_mtime_ns,) * 2)
