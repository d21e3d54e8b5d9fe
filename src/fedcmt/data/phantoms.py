"""Generated cohorts in nnU-Net raw format: brain MR with tumours and abdominal CT with liver lesions.

They let the demo and the tests run on images that behave like the real ones where it matters to a federation: several
sequences with different contrast, scanners that differ by site, oblique grids, nested tumour regions, organs that only
some sites outline. They are no substitute for patients' images: a Dice measured on them says that training works, and
nothing about clinical use.

A case is decided by (seed, split, index): the anatomy does not depend on ``style`` or ``channels``, and one sequence's
voxels do not depend on which other sequences are written. Two sites with the same seed therefore hold the same
patients; give each site its own seed.

Arrays are [X, Y, Z] in this file; the position inside the grid is u in [-1, 1] along each axis.
"""

import json
import logging
import re
import shutil
import tempfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray
from scipy import ndimage

from fedcmt.json_file import JsonFileError, read_json, write_json
from fedcmt.settings import needed_keys

logger = logging.getLogger(__name__)

FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]
LabelArray = NDArray[np.uint8]
StyleT = TypeVar("StyleT")

PHANTOM_VERSION = 1
"""Raised when the same spec gives other voxels than before; stored in phantom.json."""

FILE_ENDING = ".nii.gz"
_TRAIN, _TEST = 0, 1
_MIN_VOXELS = 8  # a structure below this is an artefact of a tiny grid, not something a network could learn
_MAX_DRAWS = 20

# ---------------------------------------------------------------------------------------------------------------------
# Styles: what differs between sites


@dataclass(frozen=True)
class MRStyle:
    """How one site's MR scanner images the same anatomy."""

    spacing_mm: tuple[float, float, float]
    """Voxel size along x, y, z."""
    scale: float
    """Stored intensity of normal white matter on T1."""
    contrast: float
    """Exponent on the tissue signals: above 1 spreads them, below 1 squeezes them together."""
    noise: float
    """Standard deviation of the noise in both receive channels (Rician magnitude), relative to ``scale``."""
    bias: float
    """Standard deviation of the log of the multiplicative bias field."""
    blur_vox: float
    """Gaussian point spread, voxels."""


@dataclass(frozen=True)
class CTStyle:
    """How one site's CT scanner and contrast protocol image the same anatomy."""

    spacing_mm: tuple[float, float, float]
    """Voxel size along x, y, z."""
    noise_hu: float
    """Standard deviation of the noise, HU."""
    blur_vox: float
    """Gaussian point spread, voxels."""
    liver_hu: float
    """Mean of the liver; set by the contrast phase, like the next four."""
    spleen_hu: float
    kidney_hu: float
    aorta_hu: float
    tumour_hu: float
    """Mean of a solid liver lesion."""


MR_STYLES: dict[str, MRStyle] = {
    "site_a": MRStyle((1.0, 1.0, 1.4), scale=800.0, contrast=1.0, noise=0.05, bias=0.08, blur_vox=0.5),
    "site_b": MRStyle((1.1, 0.95, 1.6), scale=280.0, contrast=0.9, noise=0.06, bias=0.11, blur_vox=0.6),
    "site_c": MRStyle((0.9, 0.9, 1.2), scale=1900.0, contrast=1.25, noise=0.04, bias=0.25, blur_vox=0.4),
    "site_d": MRStyle((1.2, 1.2, 1.8), scale=120.0, contrast=0.85, noise=0.11, bias=0.10, blur_vox=0.8),
}
"""Known MR sites: a 3 T scanner, an older 1.5 T one, high field with strong shading, low field with strong noise."""

CT_STYLES: dict[str, CTStyle] = {
    "site_a": CTStyle(
        (1.5, 1.5, 3.0), 12.0, 0.5, liver_hu=108, spleen_hu=122, kidney_hu=175, aorta_hu=150, tumour_hu=68
    ),
    "site_b": CTStyle((1.6, 1.6, 3.5), 16.0, 0.7, liver_hu=58, spleen_hu=48, kidney_hu=32, aorta_hu=40, tumour_hu=34),
    "site_c": CTStyle(
        (1.4, 1.4, 2.5), 20.0, 0.4, liver_hu=75, spleen_hu=105, kidney_hu=150, aorta_hu=300, tumour_hu=115
    ),
}
"""Known CT sites by contrast phase: portal venous, none, arterial (a hypervascular tumour outshines the liver)."""

# ---------------------------------------------------------------------------------------------------------------------
# Tissues

_WHITE, _GREY, _CSF, _RIM, _VESSEL, _OEDEMA, _CORE, _ENHANCING = range(8)
_OUTSIDE = 255

_MR_SIGNAL: dict[str, tuple[float, ...]] = {
    #        white grey  CSF   rim   vessel oedema core  enhancing
    "T1": (1.00, 0.76, 0.30, 0.86, 0.60, 0.68, 0.46, 0.64),
    "T1ce": (1.00, 0.78, 0.30, 0.86, 1.35, 0.68, 0.48, 1.40),
    "T2": (0.50, 0.72, 1.45, 0.75, 0.40, 1.02, 1.20, 0.88),
    "FLAIR": (0.62, 0.82, 0.22, 1.08, 0.55, 1.18, 0.90, 1.05),
}
# The rim is periventricular hyperintensity and the vessels enhance: both look like tumour on one sequence and are not.

SEQUENCES = tuple(_MR_SIGNAL)
ORGANS = ("liver", "kidney", "spleen")
LESIONS = ("none", "cyst", "tumour")

_AIR_HU, _FAT_HU, _MUSCLE_HU, _BOWEL_HU, _GAS_HU, _BONE_HU, _CYST_HU = -1000.0, -100.0, 55.0, 30.0, -700.0, 420.0, 6.0


@dataclass(frozen=True)
class _Geometry:
    spacing_mm: tuple[float, float, float]
    origin_mm: tuple[float, float, float]
    direction: tuple[float, ...]
    """Row-major 3x3 proper rotation."""


@dataclass(frozen=True)
class _Case:
    """One patient: channel images [X, Y, Z] in channel order, label [X, Y, Z], class index or None."""

    images: list[FloatArray]
    label: LabelArray
    geometry: _Geometry
    class_idx: int | None = None


@dataclass(frozen=True)
class _Spec:
    """Everything that decides the voxels of one dataset, as asked for; subclasses add what their kind needs."""

    kind: ClassVar[str]
    num_train: int
    num_test: int
    seed: int

    def check(self) -> None:
        """Raise ValueError for a value no dataset can be made from."""
        for name, low in (("num_train", 1), ("num_test", 0), ("seed", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < low:
                raise ValueError(f"{self.kind}: {name} is {value!r}; expected an integer of at least {low}.")

    def rng(self, split: int, idx: int, stream: str) -> np.random.Generator:
        """Random numbers of one aspect of one case, independent of every other aspect."""
        return np.random.default_rng([self.seed, split, idx, zlib.crc32(stream.encode())])

    def case(self, split: int, idx: int) -> _Case:
        raise NotImplementedError

    def dataset_json(self) -> dict[str, object]:
        raise NotImplementedError

    def stored(self) -> dict[str, Any]:
        """The content of phantom.json; the style by its numbers, so that an edited style counts as another spec."""
        return json.loads(json.dumps({"version": PHANTOM_VERSION, "kind": self.kind, "spec": asdict(self)}))


# ---------------------------------------------------------------------------------------------------------------------
# Entry points


def make_cohort(raw: Path, datasets: Mapping[str, Mapping[str, object]]) -> list[Path]:
    """Write several generated datasets, or keep those that are already there.

    All requests are checked before the first file is written. Each dataset appears complete or not at all.

    Args:
      raw: The nnU-Net raw folder; made when missing.
      datasets: Folder name such as ``Dataset501_DemoBrainA`` to its spec: ``kind`` ("brain_mr" or "body_ct") and the
        keyword arguments of ``make_brain_mr`` or ``make_body_ct``.

    Returns:
      The dataset folders, in the order asked for.

    Raises:
      ValueError: For an unknown kind, key, style, channel or organ, or a value out of range.
      FileExistsError: If a folder of that name holds anything but exactly this generated dataset; it is not touched.
    """
    specs = {name: _parse_spec(name, request) for name, request in datasets.items()}
    for name, spec in specs.items():
        _check_folder_name(name)
        _holds(raw / name, spec)
    return [_make(raw / name, spec) for name, spec in specs.items()]


def make_brain_mr(
    folder: Path,
    *,
    num_train: int,
    num_test: int,
    seed: int,
    style: str | MRStyle,
    shape_vox: Sequence[int] = (44, 52, 40),
    channels: Sequence[str] = SEQUENCES,
    labels: str = "regions",
    blank: Sequence[str] = (),
) -> Path:
    """Write one dataset of skull-stripped brains with one tumour each.

    Labels: 1 oedema, 2 non-enhancing core, 3 enhancing; declared as the nested regions whole_tumor, tumor_core and
    enhancing_tumor, or as these labels. Images are float32 in arbitrary scanner units, exactly 0 outside the brain.

    Args:
      folder: The dataset folder to make, named ``DatasetXXX_Name``.
      num_train: Cases in imagesTr and labelsTr.
      num_test: Cases in imagesTs and labelsTs.
      seed: Decides the patients.
      style: A key of ``MR_STYLES`` or a style of one's own.
      shape_vox: Grid size along x, y, z.
      channels: Any of ``SEQUENCES``, in channel order.
      labels: "regions" or "plain".
      blank: Some of ``channels`` whose images are zero throughout; the others, and the labels, are the same without it.

    Returns:
      ``folder``.

    Raises:
      ValueError: For an unknown style or channel, or a value out of range.
      FileExistsError: If ``folder`` holds anything but exactly this dataset.
    """
    found = _style(style, MR_STYLES)
    spec = BrainMRSpec(num_train, num_test, seed, found, tuple(shape_vox), tuple(channels), labels, tuple(blank))
    spec.check()
    _check_folder_name(folder.name)
    return _make(folder, spec)


def make_body_ct(
    folder: Path,
    *,
    num_train: int,
    num_test: int,
    seed: int,
    style: str | CTStyle,
    shape_vox: Sequence[int] = (56, 48, 28),
    organs: Sequence[str] = ORGANS,
) -> Path:
    """Write one dataset of abdominal CT with outlined organs and a class per case.

    All organs are in every image; only ``organs`` are labelled, 1, 2, ... in that order. One third of the cases each
    have no liver lesion, a cyst or a solid tumour; the class of each case is in ``classes.json``. A lesion belongs to
    the liver in the label. Images are float32 in HU.

    Args:
      folder: The dataset folder to make, named ``DatasetXXX_Name``.
      num_train: Cases in imagesTr and labelsTr.
      num_test: Cases in imagesTs and labelsTs.
      seed: Decides the patients.
      style: A key of ``CT_STYLES`` or a style of one's own.
      shape_vox: Grid size along x, y, z.
      organs: Any of ``ORGANS``.

    Returns:
      ``folder``.

    Raises:
      ValueError: For an unknown style or organ, or a value out of range.
      FileExistsError: If ``folder`` holds anything but exactly this dataset.
    """
    spec = BodyCTSpec(num_train, num_test, seed, _style(style, CT_STYLES), tuple(shape_vox), tuple(organs))
    spec.check()
    _check_folder_name(folder.name)
    return _make(folder, spec)


# ---------------------------------------------------------------------------------------------------------------------
# Brain MR


@dataclass(frozen=True)
class BrainMRSpec(_Spec):
    """One brain MR dataset; see ``make_brain_mr``."""

    kind: ClassVar[str] = "brain_mr"
    style: MRStyle
    shape_vox: tuple[int, ...] = (44, 52, 40)
    channels: tuple[str, ...] = SEQUENCES
    labels: str = "regions"
    blank: tuple[str, ...] = ()

    def check(self) -> None:
        super().check()
        _check_shape(self.kind, self.shape_vox)
        _check_names(self.kind, "channels", self.channels, SEQUENCES)
        if self.labels not in ("regions", "plain"):
            raise ValueError(f"brain_mr: labels is {self.labels!r}, expected regions or plain")
        if self.blank and (not set(self.blank) < set(self.channels)):
            raise ValueError(f"brain_mr: blank is {self.blank}, expected some, not all, of channels {self.channels}")

    def stored(self) -> dict[str, Any]:
        stored = super().stored()
        # Folders made before there was a choice stay valid.
        left_out = {"labels": self.labels == "regions", "blank": not self.blank}
        stored["spec"] = {key: value for key, value in stored["spec"].items() if not left_out.get(key, False)}
        return stored

    def case(self, split: int, idx: int) -> _Case:
        tissue, label = _brain_anatomy(self.rng(split, idx, "anatomy"), self.shape_vox)
        images = [self._image(tissue, name, self.rng(split, idx, name)) for name in self.channels]
        return _Case(images, label, _geometry(self.rng(split, idx, "geometry"), self.style.spacing_mm))

    def _image(self, tissue: LabelArray, sequence: str, rng: np.random.Generator) -> FloatArray:
        if sequence in self.blank:
            return np.zeros(tissue.shape)
        return _mr_image(rng, tissue, sequence, self.style)

    def dataset_json(self) -> dict[str, object]:
        return {
            "channel_names": {str(i): name for i, name in enumerate(self.channels)},
            **(_PLAIN if self.labels == "plain" else _REGIONS),
            "numTraining": self.num_train,
            "file_ending": FILE_ENDING,
        }


_PLAIN = {"labels": {"background": 0, "oedema": 1, "core": 2, "enhancing": 3}}
_REGIONS = {
    "labels": {"background": 0, "whole_tumor": [1, 2, 3], "tumor_core": [2, 3], "enhancing_tumor": 3},
    "regions_class_order": [1, 2, 3],
}


def _brain_anatomy(rng: np.random.Generator, shape: Sequence[int]) -> tuple[LabelArray, LabelArray]:
    """Tissue index of each voxel (``_OUTSIDE`` beyond the brain) and the tumour label, both [X, Y, Z]."""
    for _ in range(_MAX_DRAWS):
        tissue = _healthy_brain(rng, shape)
        tumour = _tumour(rng, tissue != _OUTSIDE)
        if all(np.count_nonzero(tumour == k) >= _MIN_VOXELS for k in (1, 2, 3)):
            tissue[tumour > 0] = np.array([0, _OEDEMA, _CORE, _ENHANCING], np.uint8)[tumour[tumour > 0]]
            return tissue, tumour
    raise ValueError(
        f"brain_mr: no tumour with {_MIN_VOXELS} voxels of each label fits a grid of {tuple(shape)}; "
        "ask for a larger shape_vox, at least about (20, 20, 20)."
    )


def _healthy_brain(rng: np.random.Generator, shape: Sequence[int]) -> LabelArray:
    u = _grid(shape)
    centre, axes = rng.uniform(-0.04, 0.04, 3), rng.uniform(0.82, 0.94, 3)
    radius = _distance(u, centre, axes) + 0.04 * _smooth(rng, shape, 4.0)
    tissue = np.full(tuple(shape), _OUTSIDE, np.uint8)
    tissue[radius < 1] = _WHITE
    tissue[(radius < 1) & (radius > 0.80 + 0.07 * _smooth(rng, shape, 1.5))] = _GREY
    for side in (-1, 1):
        nucleus = _distance(u, np.add(centre, (side * 0.24, 0.05, -0.05)), rng.uniform(0.10, 0.15, 3))
        tissue[nucleus < 1] = _GREY
    tissue[(radius < 1) & (radius > 0.90) & (_smooth(rng, shape, 1.2) > 0.9)] = _CSF
    tissue[(radius < 1) & (radius > 0.75) & (_smooth(rng, shape, 0.8) > 2.0)] = _VESSEL
    ventricles = _ventricles(rng, u, centre)
    tissue[(ventricles < 1.35) & (tissue == _WHITE)] = _RIM
    tissue[ventricles < 1] = _CSF
    return tissue


def _ventricles(rng: np.random.Generator, u: FloatArray, centre: FloatArray) -> FloatArray:
    """Distance to the nearer of two lateral ventricles, 1 on the wall; their size varies between patients."""
    axes = np.array([0.10, 0.36, 0.18]) * rng.uniform(0.8, 1.3)
    sides = [_distance(u, np.add(centre, (side * rng.uniform(0.14, 0.18), 0, 0.12)), axes) for side in (-1, 1)]
    return np.minimum(sides[0], sides[1]) + 0.08 * _smooth(rng, u.shape[1:], 2.0)


def _tumour(rng: np.random.Generator, brain: BoolArray) -> LabelArray:
    """A tumour label: a core with an enhancing rim, wholly or partly closed, inside irregular oedema."""
    u, shape = _grid(brain.shape), brain.shape
    direction = rng.normal(size=3)
    centre = 0.50 * rng.uniform(0.4, 1.0) * direction / np.linalg.norm(direction)
    size = rng.uniform(0.43, 0.57) * rng.uniform(0.85, 1.15, 3)
    whole = _distance(u, centre, size) + 0.12 * _smooth(rng, shape, 3.0) < 1
    core_centre = centre + 0.2 * size * rng.uniform(-1, 1, 3)
    core_radius = _distance(u, core_centre, size * rng.uniform(0.62, 0.76)) + 0.12 * _smooth(rng, shape, 2.0)
    core = (core_radius < 1) & whole
    thickness = rng.uniform(0.22, 0.36) + 0.16 * _smooth(rng, shape, 2.5)
    label = np.zeros(shape, np.uint8)
    label[whole] = 1
    label[core] = 2
    label[core & (core_radius > 1 - thickness)] = 3
    label[~brain] = 0
    return label


def _mr_image(rng: np.random.Generator, tissue: LabelArray, sequence: str, style: MRStyle) -> FloatArray:
    """One sequence [X, Y, Z] in scanner units: tissue contrast, texture, point spread, shading, Rician noise."""
    brain = tissue != _OUTSIDE
    signal = np.array(_MR_SIGNAL[sequence]) ** style.contrast
    signal = signal * rng.normal(1.0, 0.04, signal.size)
    image = np.append(signal, 0.0)[np.where(brain, tissue, signal.size)]
    image = image * (1 + 0.06 * _smooth(rng, tissue.shape, 1.0) + 0.04 * _smooth(rng, tissue.shape, 3.0))
    image = ndimage.gaussian_filter(image, style.blur_vox)
    image = image * np.exp(style.bias * _smooth(rng, tissue.shape, max(tissue.shape) / 3))
    noise = rng.normal(0.0, style.noise, (2, *tissue.shape))
    image = np.hypot(image + noise[0], noise[1])
    # Scanners store integers; 1 at least, because 0 means "outside the brain" to nnU-Net's cropping.
    stored = np.maximum(np.rint(style.scale * rng.uniform(0.85, 1.18) * image), 1.0)
    return np.where(brain, stored, 0.0)


# ---------------------------------------------------------------------------------------------------------------------
# Abdominal CT


@dataclass(frozen=True)
class BodyCTSpec(_Spec):
    """One abdominal CT dataset; see ``make_body_ct``."""

    kind: ClassVar[str] = "body_ct"
    style: CTStyle
    shape_vox: tuple[int, ...] = (56, 48, 28)
    organs: tuple[str, ...] = ORGANS

    def check(self) -> None:
        super().check()
        _check_shape(self.kind, self.shape_vox)
        _check_names(self.kind, "organs", self.organs, ORGANS)

    def case(self, split: int, idx: int) -> _Case:
        lesion = self._lesion(split, idx)
        rng = self.rng(split, idx, "anatomy")
        organs = _abdominal_organs(rng, self.shape_vox)
        hu = _ct_image(rng, organs, lesion, self.style)
        label = np.zeros(self.shape_vox, np.uint8)
        for value, name in enumerate(self.organs, start=1):
            label[organs[name]] = value
        return _Case(
            [hu], label, _geometry(self.rng(split, idx, "geometry"), self.style.spacing_mm), LESIONS.index(lesion)
        )

    def _lesion(self, split: int, idx: int) -> str:
        """Each class in every run of three cases, in shuffled order: balanced whatever the number of cases."""
        order = self.rng(split, idx // len(LESIONS), "lesion").permutation(len(LESIONS))
        return LESIONS[order[idx % len(LESIONS)]]

    def dataset_json(self) -> dict[str, object]:
        return {
            "channel_names": {"0": "CT"},
            "labels": {"background": 0} | {name: value for value, name in enumerate(self.organs, start=1)},
            "numTraining": self.num_train,
            "file_ending": FILE_ENDING,
        }


def _abdominal_organs(rng: np.random.Generator, shape: Sequence[int]) -> dict[str, BoolArray]:
    """Disjoint masks [X, Y, Z] of the organs that may be labelled."""
    u = _grid(shape)
    shift = rng.uniform(-0.04, 0.04, 3)

    def organ(centre: tuple[float, float, float], axes: tuple[float, float, float]) -> BoolArray:
        where = np.add(centre, shift) + rng.uniform(-0.03, 0.03, 3)
        return _distance(u, where, axes * rng.uniform(0.88, 1.12, 3)) + 0.06 * _smooth(rng, shape, 2.5) < 1

    liver = organ((-0.36, -0.12, 0.10), (0.36, 0.42, 0.64))
    spleen = organ((0.54, 0.16, 0.25), (0.17, 0.26, 0.38))
    kidney = organ((-0.36, 0.38, -0.25), (0.14, 0.16, 0.42)) | organ((0.36, 0.38, -0.20), (0.14, 0.16, 0.42))
    masks = {"liver": liver & ~spleen & ~kidney, "kidney": kidney, "spleen": spleen & ~kidney}
    small = [name for name, mask in masks.items() if np.count_nonzero(mask) < _MIN_VOXELS]
    if small:
        raise ValueError(
            f"body_ct: {small} have under {_MIN_VOXELS} voxels on a grid of {tuple(shape)}; enlarge shape_vox."
        )
    return masks


def _ct_image(rng: np.random.Generator, organs: Mapping[str, BoolArray], lesion: str, style: CTStyle) -> FloatArray:
    """HU [X, Y, Z]: air, fat, muscle wall, bone, bowel, vessels, organs, the lesion, then point spread and noise."""
    shape = organs["liver"].shape
    hu = _torso(rng, shape, style)
    for name, mean in (("liver", style.liver_hu), ("spleen", style.spleen_hu), ("kidney", style.kidney_hu)):
        hu[organs[name]] = mean + rng.normal(0.0, 0.06 * mean)
    # Drawn for every class, so that nothing outside the lesion depends on the class.
    mask, texture = _lesion_mask(rng, organs["liver"]), _smooth(rng, shape, 1.5)
    if lesion == "cyst":
        hu[mask] = _CYST_HU + 3.0 * texture[mask]
    elif lesion == "tumour":
        hu[mask] = style.tumour_hu + 8.0 * texture[mask]
    hu[hu > -200] += 6.0 * _smooth(rng, shape, 1.5)[hu > -200]
    hu = ndimage.gaussian_filter(hu, style.blur_vox, mode="nearest") + rng.normal(0.0, style.noise_hu, shape)
    return np.rint(np.maximum(hu, -1024.0))


def _torso(rng: np.random.Generator, shape: Sequence[int], style: CTStyle) -> FloatArray:
    """HU of everything but the organs: the trunk runs through all slices, as in an abdominal scan."""
    u = _grid(shape)
    trunk = np.hypot(u[0] / rng.uniform(0.88, 0.95), u[1] / rng.uniform(0.80, 0.90)) + 0.02 * _smooth(rng, shape, 5.0)
    hu = np.full(tuple(shape), _AIR_HU)
    hu[trunk < 1] = _FAT_HU
    hu[(trunk < 0.90) & (trunk > 0.78)] = _MUSCLE_HU
    ribs = np.sin(9.0 * u[2] + 3.0 * u[1] + rng.uniform(0, 2 * np.pi)) > 0.8
    hu[(trunk < 0.88) & (trunk > 0.82) & ribs] = _BONE_HU
    bowel = (trunk < 0.76) & (_smooth(rng, shape, 2.5) > 0.1)
    hu[bowel] = _BOWEL_HU
    hu[bowel & (u[1] < 0) & (_smooth(rng, shape, 2.0) > 1.5)] = _GAS_HU
    hu[np.hypot(u[0] / 0.14, (u[1] - 0.52) / 0.17) < 1] = _BONE_HU - 180  # spongy inside, dense at the rim
    hu[np.abs(np.hypot(u[0] / 0.14, (u[1] - 0.52) / 0.17) - 0.9) < 0.15] = _BONE_HU
    hu[np.hypot((u[0] - 0.06) / 0.07, (u[1] - 0.24) / 0.08) < 1] = style.aorta_hu
    return hu


def _lesion_mask(rng: np.random.Generator, liver: BoolArray) -> BoolArray:
    """A roundish lesion inside the liver, about a tenth of its volume."""
    u = _grid(liver.shape)
    inside = u[:, liver]
    centre, spread = inside.mean(axis=1), inside.std(axis=1)
    distance = _distance(u, centre + rng.uniform(-0.5, 0.5, 3) * spread, spread * rng.uniform(0.95, 1.25, 3))
    return (distance + 0.08 * _smooth(rng, liver.shape, 2.0) < 1) & liver


# ---------------------------------------------------------------------------------------------------------------------
# Shapes and grids


def _grid(shape: Sequence[int]) -> FloatArray:
    """Positions u [3, X, Y, Z] in [-1, 1]."""
    return np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij"))


def _distance(u: FloatArray, centre: Sequence[float] | FloatArray, axes: Sequence[float] | FloatArray) -> FloatArray:
    """Distance [X, Y, Z] from ``centre`` in units of the semi-axes: 1 on the ellipsoid."""
    column = (3, 1, 1, 1)
    return np.linalg.norm((u - np.reshape(centre, column)) / np.reshape(axes, column), axis=0)


def _smooth(rng: np.random.Generator, shape: Sequence[int], sigma_vox: float) -> FloatArray:
    """A random field [X, Y, Z] of mean 0 and standard deviation 1, correlated over about ``sigma_vox`` voxels."""
    field = ndimage.gaussian_filter(rng.normal(size=tuple(shape)), sigma_vox, mode="nearest", truncate=3.0)
    return (field - field.mean()) / field.std()


def _geometry(rng: np.random.Generator, spacing_mm: tuple[float, float, float]) -> _Geometry:
    """An oblique grid as real scans have: tilted by 5 to 20 degrees about a random axis, origin away from zero."""
    axis = rng.normal(size=3)
    x, y, z = axis / np.linalg.norm(axis)
    angle = np.deg2rad(rng.uniform(5, 20))
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    rotation = np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross  # Rodrigues
    origin = np.round(rng.uniform(20, 120, 3) * rng.choice([-1, 1], 3), 2)
    return _Geometry(
        spacing_mm, (float(origin[0]), float(origin[1]), float(origin[2])), tuple(rotation.ravel().tolist())
    )


# ---------------------------------------------------------------------------------------------------------------------
# Reading requests

_KINDS: dict[str, type[BrainMRSpec] | type[BodyCTSpec]] = {spec.kind: spec for spec in (BrainMRSpec, BodyCTSpec)}


def _parse_spec(name: str, request: Mapping[str, object]) -> _Spec:
    values = dict(request)
    kind = values.pop("kind", None)
    if not isinstance(kind, str) or kind not in _KINDS:
        raise ValueError(f"{name}: kind is {kind!r}; known kinds are {sorted(_KINDS)}.")
    spec_type = _KINDS[kind]
    known = [field.name for field in fields(spec_type)]
    if unknown := sorted(set(values) - set(known)):
        raise ValueError(f"{name}: unknown keys {unknown}; {kind} knows {['kind', *known]}.")
    if missing := [key for key in needed_keys(spec_type) if key not in values]:
        raise ValueError(f"{name}: missing keys {missing}; {kind} needs them.")
    styles: Mapping[str, object] = MR_STYLES if kind == "brain_mr" else CT_STYLES
    for key in ("shape_vox", "channels", "organs", "blank"):
        if isinstance(values.get(key), list):
            values[key] = tuple(values[key])  # type: ignore[arg-type]
    try:
        values["style"] = _style(values["style"], styles)
        spec = spec_type(**values)  # type: ignore[arg-type]
        spec.check()
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    return spec


def _style(style: object, known: Mapping[str, StyleT]) -> StyleT:
    """The named style, or the given one when it is a style already."""
    if isinstance(style, str) and style in known:
        return known[style]
    if isinstance(style, type(next(iter(known.values())))):
        return style
    raise ValueError(f"style is {style!r}; known styles are {sorted(known)}.")


def _check_shape(kind: str, shape: object) -> None:
    if not isinstance(shape, tuple) or len(shape) != 3 or not all(isinstance(n, int) and n > 0 for n in shape):
        raise ValueError(f"{kind}: shape_vox is {shape!r}; expected three positive integers (x, y, z).")


def _check_names(kind: str, key: str, names: object, known: Sequence[str]) -> None:
    if not isinstance(names, tuple) or not names or len(set(names)) != len(names) or not set(names) <= set(known):
        raise ValueError(f"{kind}: {key} is {names!r}; expected one or more of {list(known)}, each once.")


def _check_folder_name(name: str) -> None:
    if not re.fullmatch(r"Dataset\d{3}_\w+", name):
        raise ValueError(f"{name!r} is no nnU-Net dataset folder; expected a name such as 'Dataset501_DemoBrainA'.")


# ---------------------------------------------------------------------------------------------------------------------
# Writing


def _holds(folder: Path, spec: _Spec) -> bool:
    """Whether ``folder`` is exactly this dataset; False when there is nothing at all.

    Raises:
      FileExistsError: If something else is there.
    """
    if not folder.exists():
        return False
    stored = folder / "phantom.json"
    if not stored.is_file():
        raise FileExistsError(
            f"{folder} exists and has no phantom.json, so it was not generated here and may hold real images; left as "
            "it is. Choose another dataset name or another nnUNet_raw."
        )
    try:
        same = read_json(stored) == spec.stored()
    except JsonFileError:
        same = False
    if not same:
        raise FileExistsError(
            f"{folder} was generated from another spec (see {stored}); left as it is. "
            "Delete the folder, and what was preprocessed from it, to generate it afresh, or choose another name."
        )
    return True


def _make(folder: Path, spec: _Spec) -> Path:
    """Write the dataset beside ``folder`` and move it there, so that no reader meets half of it."""
    if _holds(folder, spec):
        logger.info("%s: kept, already generated from the same spec", folder)
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    # The leading dot hides the unfinished folder from nnU-Net's search for "DatasetXXX*".
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        _write_dataset(scratch / folder.name, spec)
        try:
            (scratch / folder.name).rename(folder)
        except OSError:
            # Several sites start at once and may generate the same dataset; the first one to finish is as good as ours.
            if not _holds(folder, spec):
                raise
    finally:
        shutil.rmtree(scratch)
    logger.info("%s: generated %d training and %d test cases", folder, spec.num_train, spec.num_test)
    return folder


def _write_dataset(folder: Path, spec: _Spec) -> None:
    prefix = folder.name.split("_", 1)[1]
    class_idx: dict[str, int] = {}
    plan = [(_TRAIN, "Tr", i) for i in range(spec.num_train)] + [(_TEST, "Ts", i) for i in range(spec.num_test)]
    for name in ("imagesTr", "labelsTr", "imagesTs", "labelsTs"):
        (folder / name).mkdir(parents=True)
    for number, (split, suffix, idx) in enumerate(plan):
        case_id, case = f"{prefix}_{number:03d}", spec.case(split, idx)
        for channel, image in enumerate(case.images):
            _write_image(
                folder / f"images{suffix}" / f"{case_id}_{channel:04d}{FILE_ENDING}", image, np.float32, case.geometry
            )
        _write_image(folder / f"labels{suffix}" / f"{case_id}{FILE_ENDING}", case.label, np.uint8, case.geometry)
        if case.class_idx is not None:
            class_idx[case_id] = case.class_idx
    write_json(folder / "dataset.json", spec.dataset_json(), indent=2)
    if class_idx:
        write_json(folder / "classes.json", {"classes": list(LESIONS), "cases": class_idx}, indent=2)
    write_json(folder / "phantom.json", spec.stored(), indent=2)


def _write_image(path: Path, array: FloatArray | LabelArray, dtype: type[np.generic], geometry: _Geometry) -> None:
    image = sitk.GetImageFromArray(np.ascontiguousarray(array.T, dtype))  # SimpleITK takes [Z, Y, X]
    image.SetSpacing(geometry.spacing_mm)
    image.SetOrigin(geometry.origin_mm)
    image.SetDirection(geometry.direction)
    sitk.WriteImage(image, str(path), useCompression=True, compressionLevel=1)
