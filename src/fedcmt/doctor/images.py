"""Checks across the cases of a data set, which no single file can show: units, orientation, duplicates, balance.

`fedcmt.data.checks.check_dataset` comes first: these take files that can be read, with a label for each training case.
"""

import hashlib
import logging
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from fedcmt.data.checks import Grid, list_cases, list_training_cases, read_image
from fedcmt.doctor.findings import Finding, ok, problem, some, warning
from fedcmt.models.scopes import slot_name
from fedcmt.progress import Progress

logger = logging.getLogger(__name__)

_SPACING_MM = (0.05, 20.0)
_HIGHEST_HU = 10_000
"""Above this no tissue lies, nor metal on a scanner's extended scale by much; 16-bit exports without a sign do."""
_FEW_CASES = 5
_AXES = ("RL", "AP", "IS")
"""Where lower and higher coordinates lie along SimpleITK's x, y and z: right or left, front or back, below or above."""


@dataclass(frozen=True)
class CaseFacts:
    """What the checks need of one case, without its voxels.

    Attributes:
      case: Folder and case id, e.g. "imagesTr/p01".
      size_vox: Along x, y, z of the image's grid.
      spacing_mm: As ``size_vox``.
      direction: Row-major 3x3 direction cosines.
      digests: SHA-256 of each channel's voxels as float32; empty for an image of zeros.
      lows: Lowest intensity of each channel.
      highs: Highest intensity of each channel.
      label_voxels: Label value to voxels; empty for a test case.
    """

    case: str
    size_vox: tuple[int, ...]
    spacing_mm: tuple[float, ...]
    direction: tuple[float, ...]
    digests: tuple[str, ...] = ()
    lows: tuple[float, ...] = ()
    highs: tuple[float, ...] = ()
    label_voxels: Mapping[int, int] = field(default_factory=dict)

    @property
    def training(self) -> bool:
        """Whether the case is of imagesTr."""
        return self.case.startswith("imagesTr/")


def read_facts(folder: Path, dataset_json: Mapping[str, object]) -> list[CaseFacts]:
    """Read every image and label of a data set that passed `check_dataset`, one at a time.

    Raises:
      DatasetError: If files are missing, or one is no 3-D image that can be read.
    """
    training = list_training_cases(folder, dataset_json)
    test = list_cases(folder, dataset_json, "imagesTs") if any((folder / "imagesTs").glob("*")) else {}
    progress = Progress(f"{folder.name}: reading", logger)
    facts = []
    for name, case in training.items():
        facts.append(_facts(f"imagesTr/{name}", case.images, case.label))
        progress.update(len(facts), len(training) + len(test))
    for name, images in test.items():
        facts.append(_facts(f"imagesTs/{name}", images, None))
        progress.update(len(facts), len(training) + len(test))
    return facts


def _facts(case: str, images: Sequence[Path], label: Path | None) -> CaseFacts:
    grids, digests, lows, highs = zip(*(_channel_facts(path) for path in images), strict=True)
    voxels: dict[int, int] = {}
    if label is not None:
        values, counts = np.unique(read_image(label)[1], return_counts=True)
        voxels = {int(value): int(count) for value, count in zip(values, counts, strict=True)}
    grid = grids[0]
    return CaseFacts(case, grid.size_vox, grid.spacing_mm, grid.direction, digests, lows, highs, voxels)


def _channel_facts(path: Path) -> tuple[Grid, str, float, float]:
    grid, array = read_image(path)
    # One type for all, so that a copy that was stored in another one is found too.
    array = np.ascontiguousarray(array, dtype=np.float32)
    digest = hashlib.sha256(repr(array.shape).encode() + array.tobytes()).hexdigest() if array.any() else ""
    return grid, digest, float(array.min()), float(array.max())


def across_cases(
    facts: Sequence[CaseFacts], channels: Sequence[str], labels: Mapping[str, int | list[int]]
) -> list[Finding]:
    """All checks of this module, in the order of a report."""
    return [
        *spacing_findings(facts),
        *orientation_findings(facts),
        *intensity_findings(facts, channels),
        *duplicate_findings(facts, channels),
        *name_findings(facts),
        *label_findings(facts, labels),
    ]


def spacing_findings(facts: Sequence[CaseFacts]) -> list[Finding]:
    """Voxel sizes no scanner has, and those that a converter writes when it knows none."""
    low, high = _SPACING_MM
    strange = [f"{f.case} {_rounded(f.spacing_mm)}" for f in facts if not all(low <= s <= high for s in f.spacing_mm)]
    if strange:
        return [
            problem(
                "spacing",
                f"{some(strange)} mm",
                f"{low} to {high:g} mm on every axis",
                "Export these again with voxel sizes in mm.",
            )
        ]
    lost = all(set(f.spacing_mm) == {1.0} for f in facts) and any(len(set(f.size_vox)) > 1 for f in facts)
    if lost:
        return [
            warning(
                "spacing",
                "exactly 1 x 1 x 1 mm in every case, with axes of unequal length",
                "the scanner's voxel sizes",
                "Nothing to do if the images were resampled to that, as BraTS is; else the spacing was lost.",
            )
        ]
    ends = [(f"{min(axis):.3g}", f"{max(axis):.3g}") for axis in zip(*(f.spacing_mm for f in facts), strict=True)]
    ranges = [first if first == last else f"{first} to {last}" for first, last in ends]
    return [ok("spacing", " x ".join(ranges) + " mm")]


def orientation_findings(facts: Sequence[CaseFacts]) -> list[Finding]:
    """Grids that are not at right angles, and cases whose axes point elsewhere than the others'."""
    skewed = [f.case for f in facts if not _orthogonal(f.direction)]
    if skewed:
        return [
            problem(
                "orientation",
                f"axes that are not at right angles in {some(skewed)}",
                "orthogonal direction cosines",
                "Resample these onto an orthogonal grid (a tilted gantry gives such images).",
            )
        ]
    cases = defaultdict(list)
    for f in facts:
        cases[_axis_code(f.direction)].append(f.case)
    if len(cases) == 1:
        return [ok("orientation", f"{next(iter(cases))} in all {len(facts)} cases")]
    shown = "; ".join(f"{code} in {some(names, 2)}" for code, names in sorted(cases.items()))
    return [
        warning(
            "orientation",
            shown,
            "one orientation of the axes",
            "nnU-Net reads arrays as they are stored, so these are turned or mirrored against each other. "
            "Reorient all to one.",
        )
    ]


def _orthogonal(direction: Sequence[float]) -> bool:
    matrix = np.array(direction).reshape(3, 3)
    return bool(np.allclose(matrix.T @ matrix, np.eye(3), atol=1e-3))


def _axis_code(direction: Sequence[float]) -> str:
    """Where each of the three image axes points to, roughly: "LPS" is to the left, to the back and up."""
    matrix = np.array(direction).reshape(3, 3)
    nearest = np.abs(matrix).argmax(axis=0)
    return "".join(_AXES[row][int(matrix[row, axis] > 0)] for axis, row in enumerate(nearest))


def intensity_findings(facts: Sequence[CaseFacts], channels: Sequence[str]) -> list[Finding]:
    """CT that does not look like Hounsfield units; other modalities have no unit to check."""
    found: list[Finding] = []
    for channel, name in enumerate(channels):
        if slot_name(name) == "ct":
            found += _hounsfield_findings(facts, channel)
    return found


def _hounsfield_findings(facts: Sequence[CaseFacts], channel: int) -> list[Finding]:
    lows, highs = ([getattr(f, which)[channel] for f in facts] for which in ("lows", "highs"))
    span = f"{min(lows):g} to {max(highs):g}"
    shifted = [f.case for f in facts if f.lows[channel] >= 0]
    if 0 < len(shifted) < len(facts):
        return [
            problem(
                "CT unit",
                f"no value below 0 in {some(shifted)}, but in the other cases",
                "one unit in all cases, Hounsfield's",
                "Apply rescale slope and intercept of the DICOM files to these.",
            )
        ]
    if shifted:
        return [
            warning(
                "CT unit",
                f"{span}: no value is below 0",
                "Hounsfield units: air -1000, water 0",
                "Apply rescale slope and intercept of the DICOM files, unless a window was cut out on purpose.",
            )
        ]
    if max(highs) > _HIGHEST_HU:
        return [
            warning(
                "CT unit",
                f"{span}",
                f"Hounsfield units, below {_HIGHEST_HU}",
                "Look at the highest values: they are metal at best, and a number without its sign at worst.",
            )
        ]
    return [ok("CT unit", f"{span}, as of Hounsfield units")]


def duplicate_findings(facts: Sequence[CaseFacts], channels: Sequence[str]) -> list[Finding]:
    """One image under two case ids, or under two channels of one case."""
    where: dict[str, list[tuple[CaseFacts, int]]] = defaultdict(list)
    for f in facts:
        for channel, digest in enumerate(f.digests):
            if digest:
                where[digest].append((f, channel))
    same_case = sorted(
        {
            f"{f.case} ({' and '.join(channels[c] for g, c in places if g is f)})"
            for places in where.values()
            for f, _ in places
            if sum(g is f for g, _ in places) > 1
        }
    )
    groups = sorted({tuple(sorted({f.case for f, _ in places})) for places in where.values()})
    copies = [group for group in groups if len(group) > 1]
    leaks = [group for group in copies if len({case.split("/")[0] for case in group}) > 1]
    found = []
    if same_case:
        remedy = "Give each channel its own image: one file was copied to two names."
        found.append(problem("duplicates", f"channels with the same voxels: {some(same_case)}", "", remedy))
    if copies:
        kind = "training cases among the test cases" if leaks else "cases with the same voxels"
        shown = some([" = ".join(group) for group in (leaks or copies)])
        remedy = "Keep one of each; a model must not be tested on what it was trained on."
        found.append(problem("duplicates", f"{kind}: {shown}", "other voxels in every case", remedy))
    return found or [ok("duplicates", f"none among {len(facts)} cases")]


def name_findings(facts: Sequence[CaseFacts]) -> list[Finding]:
    """Case ids that are one file on a disk that ignores capitals."""
    counts = Counter(f.case.lower() for f in facts)
    clashes = sorted(f.case for f in facts if counts[f.case.lower()] > 1)
    if not clashes:
        return []
    remedy = "Rename them: on a disk that ignores capitals one overwrites the other."
    return [warning("names", f"{some(clashes)} differ in capitals only", "ids that differ otherwise", remedy)]


def label_findings(facts: Sequence[CaseFacts], labels: Mapping[str, int | list[int]]) -> list[Finding]:
    """How often each label is there, and which are too rare to learn."""
    training = [f for f in facts if f.training]
    total = sum(sum(f.label_voxels.values()) for f in training)
    shares, found = [], []
    for name, value in labels.items():
        if name in ("background", "ignore"):
            continue
        values = value if isinstance(value, list) else [value]
        voxels = [sum(f.label_voxels.get(v, 0) for v in values) for f in training]
        present = sum(v > 0 for v in voxels)
        shares.append(f"{name} in {present} of {len(training)} cases, {100 * sum(voxels) / max(total, 1):.2g} %")
        if present < min(_FEW_CASES, len(training)):
            remedy = "Add cases, or take the label out of dataset.json; a fold may validate without it."
            found.append(warning("labels", f"{name!r} in {present} training cases", f"{_FEW_CASES} or more", remedy))
    empty = [f.case for f in training if not any(v > 0 for v in f.label_voxels)]
    if empty:
        remedy = "Right if these patients have nothing to outline; else their labels were lost."
        found.append(warning("labels", f"no label but background in {some(empty)}", "some foreground", remedy))
    return [ok("labels", "; ".join(shares) + " of the voxels"), *found]


def _rounded(values: Sequence[float]) -> tuple[float, ...]:
    return tuple(round(value, 4) for value in values)
