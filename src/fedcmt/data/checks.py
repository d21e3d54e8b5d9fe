"""Checks of a raw nnU-Net dataset before any training starts.

A federated run stops for everybody when one site's data turn out broken in round 1. These checks read every file of
a dataset once and report all they find in one error, with the file and the remedy on each line, so that a site can put
its data right in one go. They need neither nnU-Net nor its environment variables. All other code reads dataset.json
and lists cases here too, so that what passed the checks is what is used.

Voxels of NIfTI files are read with nibabel: SimpleITK fills a file that was cut off with zeros and turns NaN into 0,
both without a word. Grids are read with SimpleITK, because that is how nnU-Net sees them.
"""

import json
import math
import re
import threading
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import nibabel
import numpy as np
import SimpleITK as sitk
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError

from fedcmt.json_file import JsonFileError, read_json
from fedcmt.models.scopes import slot_name

FILE_ENDINGS = (".nii.gz", ".nrrd", ".mha", ".gipl")
"""What nnU-Net reads through SimpleITK, which keeps oblique grids."""

SPLITS_FILE = "splits_final.json"

MAX_PROBLEMS_SHOWN = 20

_REQUIRED_KEYS: dict[str, type] = {"channel_names": dict, "labels": dict, "numTraining": int, "file_ending": str}
_OTHER_IMAGE_ENDINGS = (*FILE_ENDINGS, ".nii", ".png", ".tif", ".tiff", ".dcm")
# ITK's readers are not safe in several threads: about one process in forty died of a damaged heap.
_SIMPLEITK = threading.Lock()
_READ_THREADS = 4
_TOLERANCE = 1e-3
_SMALLEST_EDGE_MM, _LARGEST_EDGE_MM = 1e-4, 1e4
_MOST_COMPRESSED = 1032
"""Bytes that one byte of a gzip file can stand for (RFC 1951)."""
READ_ERRORS = (
    *(RuntimeError, OSError, EOFError, ValueError, OverflowError, MemoryError),
    *(zlib.error, ImageFileError, HeaderDataError),
)
"""What SimpleITK, gzip and nibabel raise for a damaged file."""


class DatasetError(ValueError):
    """A dataset nnU-Net cannot be trained on; the message has one line per problem."""


@dataclass(frozen=True)
class DatasetSummary:
    """What a dataset that passed the checks holds."""

    folder: Path
    name: str
    """Folder name, ``DatasetXXX_Name``."""
    dataset_id: int
    channel_names: tuple[str, ...]
    """In channel order."""
    num_training: int
    num_test: int
    """Cases in imagesTs; 0 without that folder."""
    labels: dict[str, int | list[int]]
    """As in dataset.json: name to label value, or to the label values of a region."""
    training_cases: tuple[str, ...]
    test_cases: tuple[str, ...]


@dataclass(frozen=True)
class Case:
    """The raw files of one training case."""

    images: tuple[Path, ...]
    """One per channel, in channel order."""
    label: Path


@dataclass(frozen=True)
class Grid:
    """Where an image's voxels lie, along x, y and z; ``direction`` is row-major."""

    size_vox: tuple[int, ...]
    spacing_mm: tuple[float, ...]
    origin_mm: tuple[float, ...]
    direction: tuple[float, ...]


@dataclass(frozen=True)
class _CaseFiles:
    channels: list[Path]
    label: Path | None


def is_dangling(path: Path) -> bool:
    """Whether a path is a symbolic link that leads to no file."""
    return path.is_symlink() and not path.exists()


def find_dataset(raw: Path, dataset_id: int) -> Path:
    """The folder ``DatasetXXX_Name`` of a dataset id.

    Args:
      raw: The nnU-Net raw folder.
      dataset_id: 1 to 999.

    Returns:
      The dataset folder.

    Raises:
      DatasetError: If the raw folder is missing, or holds no or several datasets of that id.
    """
    if not raw.is_dir():
        raise DatasetError(f"raw folder {raw} does not exist. Set nnUNet_raw to the folder that holds DatasetXXX_Name.")
    datasets = sorted(path for path in raw.glob("Dataset*_*") if path.is_dir())
    matches = [path for path in datasets if path.name.startswith(f"Dataset{dataset_id:03d}_")]
    if len(matches) == 1:
        return matches[0]
    if matches:
        raise DatasetError(
            f"{raw}: dataset id {dataset_id} is taken by {[path.name for path in matches]}; nnU-Net needs one per id. "
            "Rename or move all but one."
        )
    raise DatasetError(
        f"{raw}: no folder Dataset{dataset_id:03d}_*; found {[path.name for path in datasets] or 'no dataset at all'}. "
        "Check the dataset id in the site's configuration and nnUNet_raw."
    )


def read_dataset_json(folder: Path) -> dict:
    """Read and check dataset.json.

    Args:
      folder: The dataset folder.

    Returns:
      The content of dataset.json.

    Raises:
      DatasetError: If the file is missing, is not JSON, or breaks nnU-Net's format; lists every problem.
    """
    try:
        content = read_json(folder / "dataset.json")
    except JsonFileError as error:
        raise DatasetError(f"{error}. Write it as in docs/data.md.") from error
    raise_if(folder, _dataset_json_problems(content))
    return content


def read_splits(file: Path) -> list[dict[str, list[str]]]:
    """Read and check splits_final.json.

    Args:
      file: The file.

    Returns:
      The training and validation cases of each fold, under ``train`` and ``val``.

    Raises:
      DatasetError: If the file is not JSON or has another form.
    """
    try:
        folds = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise DatasetError(f"{file}: not valid JSON ({error}). Restore the file.") from error
    if not (isinstance(folds, list) and all(map(_is_fold, folds))):
        raise DatasetError(
            f'{file}: expected a list of folds, each {{"train": [case, ...], "val": [case, ...]}} with names of cases. '
            "Restore the file."
        )
    return folds


def find_splits(dataset: Path, preprocessed: Path | None) -> Path | None:
    """The split that training takes: the data set's own, else nnU-Net's in its preprocessed folder; None draws one.

    Args:
      dataset: The dataset folder.
      preprocessed: The nnU-Net preprocessed folder; None if it is not known.
    """
    folders = [dataset] if preprocessed is None else [dataset, preprocessed / dataset.name]
    return next((folder / SPLITS_FILE for folder in folders if (folder / SPLITS_FILE).is_file()), None)


def check_splits(file: Path, cases: Collection[str], fold: int | None = None) -> None:
    """Check a split before it is trained on.

    Args:
      file: A splits_final.json.
      cases: The training cases that are there.
      fold: The one that is trained; None checks all.

    Raises:
      DatasetError: If the file is damaged or lacks the fold, for which nnU-Net would draw cases at random, or names
        cases that are not there.
    """
    folds = read_splits(file)
    if fold is not None and fold >= len(folds):
        raise DatasetError(f"{file}: has {len(folds)} folds, fold is {fold}; set sites.fold to 0 to {len(folds) - 1}")
    checked = folds if fold is None else [folds[fold]]
    named = {case for split in checked for part in ("train", "val") for case in split[part]}
    if missing := sorted(named - set(cases)):
        raise DatasetError(
            f"{file}: names {len(missing)} cases that imagesTr does not hold: {missing[:5]}. Correct the file, or add "
            "the cases."
        )


def _is_fold(value: object) -> bool:
    return isinstance(value, dict) and all(
        isinstance(cases := value.get(part), list) and all(isinstance(case, str) for case in cases)
        for part in ("train", "val")
    )


def channel_names(dataset_json: Mapping) -> tuple[str, ...]:
    """The channels' names in the order of the files' ``_0000``, ``_0001``, ...

    Args:
      dataset_json: As from ``read_dataset_json``.
    """
    names = dataset_json["channel_names"]
    return tuple(names[str(i)] for i in range(len(names)))


def list_cases(folder: Path, dataset_json: Mapping[str, object], images: str = "imagesTr") -> dict[str, list[Path]]:
    """The channel files of each case.

    Args:
      folder: The dataset folder.
      dataset_json: As from ``read_dataset_json``.
      images: ``imagesTr`` or ``imagesTs``.

    Returns:
      Case id to its files in channel order, sorted by case id.

    Raises:
      DatasetError: If the folder is missing or empty, a channel is missing or one too many, or an image is not named
        CASE_0000 + file ending.
    """
    cases, problems = _scan_images(folder, dataset_json, images)
    if not cases and not problems:
        problems = [_no_images(folder, dataset_json, images)]
    raise_if(folder, problems)
    return cases


def list_training_cases(folder: Path, dataset_json: Mapping[str, object]) -> dict[str, Case]:
    """The files of each training case.

    Args:
      folder: The dataset folder.
      dataset_json: As from ``read_dataset_json``.

    Returns:
      Case id to its files, sorted by case id.

    Raises:
      DatasetError: Where ``list_cases`` does, or if an image has no label or a label no image.
    """
    cases, problems = _pair_with_labels(folder, dataset_json, "Tr")
    raise_if(folder, problems)
    labels, ending = folder / "labelsTr", dataset_json["file_ending"]
    return {case: Case(tuple(files.channels), labels / f"{case}{ending}") for case, files in cases.items()}


def check_dataset(
    folder: Path, *, num_folds: int | None = 5, channels: Sequence[str] | None = None, missing_channels: bool = False
) -> DatasetSummary:
    """Check a whole raw dataset, voxels included.

    Args:
      folder: The dataset folder, ``DatasetXXX_Name``.
      num_folds: Cross-validation folds the training cases are split into; None when training uses all cases.
      channels: Channel names in the order the site's configuration gives them; None to skip that check.
      missing_channels: Whether an image of zeros stands for a sequence that its case lacks; not all of a case's may.

    Returns:
      What the dataset holds.

    Raises:
      DatasetError: With one line per problem found, the first 20 of them in full.
    """
    name = re.fullmatch(r"Dataset(\d{3})_.+", folder.name)
    if not folder.is_dir() or name is None:
        raise DatasetError(f"{folder} is no dataset folder. Give an existing folder named DatasetXXX_Name.")
    dataset_json = read_dataset_json(folder)
    problems = _channel_problems(dataset_json, channels)
    training, train_problems = _pair_with_labels(folder, dataset_json, "Tr")
    test, test_problems = _pair_with_labels(folder, dataset_json, "Ts")
    problems += _count_problems(folder, dataset_json, num_folds) + train_problems + test_problems
    problems += _leak_problems(folder, dataset_json)
    for part in ("imagesCommon", "labelsCommon", "imagesCommonVal", "labelsCommonVal"):
        problems += _link_problems(folder / part, dataset_json)
    labels = _allowed_labels(dataset_json)
    problems += _voxel_problems([*training.values(), *test.values()], labels, missing_channels)
    raise_if(folder, problems)
    return DatasetSummary(
        folder=folder,
        name=folder.name,
        dataset_id=int(name[1]),
        channel_names=channel_names(dataset_json),
        num_training=len(training),
        num_test=len(test),
        labels=dict(dataset_json["labels"]),
        training_cases=tuple(training),
        test_cases=tuple(test),
    )


def raise_if(folder: Path, problems: Sequence[str]) -> None:
    if not problems:
        return
    lines = [f"- {problem}" for problem in problems[:MAX_PROBLEMS_SHOWN]]
    if len(problems) > MAX_PROBLEMS_SHOWN:
        lines.append(f"... and {len(problems) - MAX_PROBLEMS_SHOWN} more")
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    raise DatasetError("\n".join([f"{folder.name}: {count} in {folder}", *lines]))


# ---------------------------------------------------------------------------------------------------------------------
# dataset.json


def _dataset_json_problems(content: Mapping[str, object]) -> list[str]:
    if "dataset" in content:
        return [
            "dataset.json: key 'dataset' lists files one by one, which is not supported. "
            "Remove it and put the files into imagesTr and labelsTr."
        ]
    problems = [_required_key_problem(content, key, kind) for key, kind in _REQUIRED_KEYS.items()]
    found = [problem for problem in problems if problem]
    checks: dict[str, Callable[[Mapping], list[str]]] = {
        "channel_names": _channel_name_problems,
        "labels": _label_problems,
        "numTraining": _num_training_problems,
        "file_ending": _file_ending_problems,
    }
    for key, problem in zip(_REQUIRED_KEYS, problems, strict=True):
        found += [] if problem else checks[key](content)
    return found


def _required_key_problem(content: Mapping[str, object], key: str, kind: type) -> str | None:
    if key not in content:
        hint = ". Rename the key 'modality' to it" if key == "channel_names" and "modality" in content else ". Add it"
        return f"dataset.json: key {key!r} is missing; needed are {list(_REQUIRED_KEYS)}{hint}."
    value = content[key]
    if not isinstance(value, kind) or isinstance(value, bool):
        expected = {dict: "an object {...}", int: "an integer", str: "a text"}[kind]
        return f"dataset.json: {key} is {value!r}; expected {expected}. Correct it."
    return None


def _channel_name_problems(content: Mapping) -> list[str]:
    names = content["channel_names"]
    expected = [str(i) for i in range(len(names))]
    if not names or sorted(names) != sorted(expected):
        return [
            f"dataset.json: channel_names has the keys {list(names)}; expected {expected or ['0']}. "
            "Number the channels from 0 without gaps, as in the file names CASE_0000, CASE_0001."
        ]
    bad = {key: name for key, name in names.items() if not isinstance(name, str) or not name}
    if bad:
        return [f"dataset.json: channel_names {bad} are no names. Give each channel a text such as 'T1'."]
    counts = Counter(slot_name(name) for name in names.values())
    same = {key: name for key, name in names.items() if counts[slot_name(name)] > 1}
    if not same:
        return []
    return [
        f"dataset.json: channel_names {same} are one name, capitals and blanks aside. Give each channel its own: "
        "sites are matched by it."
    ]


def _num_training_problems(content: Mapping) -> list[str]:
    count = content["numTraining"]
    return [] if count > 0 else [f"dataset.json: numTraining is {count}. Set it to the number of cases in imagesTr."]


def _file_ending_problems(content: Mapping) -> list[str]:
    ending = content["file_ending"]
    if ending in FILE_ENDINGS:
        return []
    return [
        f"dataset.json: file_ending is {ending!r}; supported are {list(FILE_ENDINGS)}. Convert the images to .nii.gz."
    ]


def _label_problems(content: Mapping) -> list[str]:
    labels = content["labels"]
    if any(not _is_label(value) for value in labels.values()):
        bad = {key: value for key, value in labels.items() if not _is_label(value)}
        return [
            f"dataset.json: labels {bad} are neither integers nor lists of integers. "
            'Write name to value, such as {"background": 0, "liver": 1}.'
        ]
    if labels.get("background") != 0:
        return [
            f"dataset.json: label 'background' is {labels.get('background', 'missing')}; expected 0. "
            'Add "background": 0 to labels.'
        ]
    values = sorted(_label_values(labels))
    if values != list(range(len(values))) or len(values) < 2:
        return [
            f"dataset.json: labels use the values {values}; expected 0, 1, 2, ... without gaps, and one or more beyond "
            "0. Renumber them, in the label images too."
        ]
    return _ignore_problems(labels) + _region_problems(labels, content.get("regions_class_order"))


def _ignore_problems(labels: Mapping[str, int | list[int]]) -> list[str]:
    """nnU-Net leaves voxels labelled 'ignore' out of the loss; it needs that value to be the last."""
    if "ignore" not in labels:
        return []
    ignore, others = labels["ignore"], _label_values({key: v for key, v in labels.items() if key != "ignore"})
    if isinstance(ignore, int) and ignore == max(others) + 1:
        return []
    return [
        f"dataset.json: label 'ignore' is {ignore}; expected one integer, the highest. Set it to {max(others) + 1}."
    ]


def _region_problems(labels: Mapping[str, int | list[int]], order: object) -> list[str]:
    regions = [key for key in labels if key not in ("background", "ignore")]
    if not any(isinstance(labels[key], list) for key in regions):
        return []
    if order is None:
        return [
            f"dataset.json: {regions} hold regions but regions_class_order is missing. "
            "Add one label value per region, the widest region first."
        ]
    values = sorted(_label_values({key: labels[key] for key in regions}) - {0})
    if not isinstance(order, list) or len(order) != len(regions) or any(value not in values for value in order):
        return [
            f"dataset.json: regions_class_order is {order!r}; expected {len(regions)} label values, one for each of "
            f"{regions}. Correct it."
        ]
    return []


def _is_label(value: object) -> bool:
    if isinstance(value, list):
        return bool(value) and all(not isinstance(item, list) and _is_label(item) for item in value)
    return isinstance(value, int) and not isinstance(value, bool)


def _label_values(labels: Mapping[str, int | list[int]]) -> set[int]:
    return {item for value in labels.values() for item in (value if isinstance(value, list) else [value])}


def _allowed_labels(dataset_json: Mapping) -> list[int]:
    return sorted(_label_values(dataset_json["labels"]))


def _channel_problems(dataset_json: Mapping, channels: Sequence[str] | None) -> list[str]:
    have = channel_names(dataset_json)
    if channels is None or tuple(channels) == have:
        return []
    return [
        f"dataset.json: channel_names in order are {list(have)}, the site's configuration says {list(channels)}. "
        "Make them equal, order included: a swapped channel would train another hospital's slot."
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Files present


def _count_problems(folder: Path, dataset_json: Mapping, num_folds: int | None) -> list[str]:
    found, expected = len(_case_channels(folder, dataset_json, "imagesTr")), dataset_json["numTraining"]
    problems = []
    if found and found != expected:
        problems.append(
            f"dataset.json: numTraining is {expected} but imagesTr holds {found} cases. "
            f"Set it to {found}, or complete the copy."
        )
    needed = 2 if num_folds is None else num_folds
    if 0 < found < needed:
        purpose = "fold 'all'" if num_folds is None else f"{num_folds}-fold cross-validation"
        advice = "Add cases" if num_folds is None else "Add cases or train with fold 'all' (--set sites.fold=all)"
        problems.append(f"imagesTr: {found} training cases; {purpose} needs at least {needed}. {advice}.")
    return problems


def _leak_problems(folder: Path, dataset_json: Mapping) -> list[str]:
    """A case id in imagesTr and among images to test on: most likely one patient, tested on what was trained on."""
    training = _case_channels(folder, dataset_json, "imagesTr")
    problems = []
    for images in ("imagesTs", "imagesCommon", "imagesCommonVal"):
        held_out = _case_channels(folder, dataset_json, images)
        if both := [case for case in training if case in held_out]:
            shown = ", ".join(both[:5]) + (", ..." if len(both) > 5 else "")
            problems.append(
                f"{images}: the cases of imagesTr are there too: {shown} ({len(both)} in all). A model must not be "
                "tested on what it was trained on: remove them from one of the two, or rename them if they are other "
                "images."
            )
    return problems


def _pair_with_labels(folder: Path, dataset_json: Mapping, split: str) -> tuple[dict[str, _CaseFiles], list[str]]:
    """Channel files and label of each complete case of split "Tr" or "Ts", and what is wrong with the others."""
    images, labels = f"images{split}", f"labels{split}"
    cases, problems = _scan_images(folder, dataset_json, images)
    if split == "Tr" and not cases and not problems:
        problems.append(_no_images(folder, dataset_json, images))
    ending = str(dataset_json["file_ending"])
    present = {path.name.removesuffix(ending): path for path in _files(folder / labels) if path.name.endswith(ending)}
    named = set(_case_channels(folder, dataset_json, images))
    problems += _link_problems(folder / labels, dataset_json)
    # Test cases need no labels, but once there are some, a missing one is a slip that would bias the evaluation.
    if split == "Tr" or present:
        problems += [
            f"{labels}/{case}{ending} is missing for {images}/{case}_0000{ending}. Add the label or remove the image."
            for case in sorted(named - set(present))
        ]
    problems += [
        f"{labels}/{present[case].name} has no image {images}/{case}_0000{ending}. Add the image or remove the label."
        for case in sorted(set(present) - named)
    ]
    readable = {case: path for case, path in present.items() if not is_dangling(path)}
    return {case: _CaseFiles(files, readable.get(case)) for case, files in cases.items()}, problems


def _scan_images(folder: Path, dataset_json: Mapping, images: str) -> tuple[dict[str, list[Path]], list[str]]:
    """The complete cases, and one line for each missing, surplus or misnamed file, or link that leads to none."""
    ending = str(dataset_json["file_ending"])
    expected = range(len(dataset_json["channel_names"]))
    problems = [
        f"{images}/{path.name} is not named CASE_0000{ending}. Rename it to the case id, an underscore, the four-digit "
        f"channel number and {ending}, or move it away."
        for path in _files(folder / images)
        if path.name.lower().endswith(_OTHER_IMAGE_ENDINGS) and _parse_image_name(path.name, ending) is None
    ]
    problems += _link_problems(folder / images, dataset_json)
    cases = {}
    for case, channels in _case_channels(folder, dataset_json, images).items():
        missing = [
            f"{images}/{case}_{i:04d}{ending} is missing (channel {i}, {dataset_json['channel_names'][str(i)]!r}). "
            "Every case needs all channels: add the file or remove the case."
            for i in expected
            if i not in channels
        ]
        surplus = [
            f"{images}/{path.name} is channel {i}, but dataset.json names {len(expected)} channels. "
            "Remove the file or add the channel to channel_names."
            for i, path in channels.items()
            if i not in expected
        ]
        problems += missing + surplus
        if not missing and not surplus and not any(map(is_dangling, channels.values())):
            cases[case] = [channels[i] for i in expected]
    return cases, problems


def _case_channels(folder: Path, dataset_json: Mapping, images: str) -> dict[str, dict[int, Path]]:
    """Case id to channel number to file, for every well-named image; sorted."""
    found: dict[str, dict[int, Path]] = {}
    for path in _files(folder / images):
        parsed = _parse_image_name(path.name, str(dataset_json["file_ending"]))
        if parsed:
            found.setdefault(parsed[0], {})[parsed[1]] = path
    return dict(sorted(found.items()))


def _parse_image_name(name: str, ending: str) -> tuple[str, int] | None:
    match = re.fullmatch(rf"(.+)_(\d{{4}}){re.escape(ending)}", name)
    return (match[1], int(match[2])) if match else None


def _files(folder: Path) -> list[Path]:
    """Files, and links that should lead to one."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.is_file() or is_dangling(path))


def _link_problems(folder: Path, dataset_json: Mapping) -> list[str]:
    """One line for each image or label that is a link to a file that is not there, as after a move."""
    return [
        f"{_short(path)} is a link to {path.readlink()}, where there is no file. Link or copy the file again."
        for path in _files(folder)
        if path.name.endswith(str(dataset_json["file_ending"])) and is_dangling(path)
    ]


def _no_images(folder: Path, dataset_json: Mapping, images: str) -> str:
    state = "holds no images" if (folder / images).is_dir() else "does not exist"
    return f"{images} {state}. Put the images there, named CASE_0000{dataset_json['file_ending']}."


# ---------------------------------------------------------------------------------------------------------------------
# Voxels


def _voxel_problems(cases: Iterable[_CaseFiles], allowed: Sequence[int], missing_channels: bool) -> list[str]:
    # Threads, not processes: zlib releases the GIL while it decompresses, and FLARE clients may not fork.
    with ThreadPoolExecutor(_READ_THREADS) as pool:
        found = pool.map(lambda case: _case_problems(case, allowed, missing_channels), cases)
        return [problem for problems in found for problem in problems]


def _case_problems(case: _CaseFiles, allowed: Sequence[int], missing_channels: bool) -> list[str]:
    """Read each file of one case once; only grids are kept, so one image is in memory at a time."""
    problems: list[str] = []
    blank: list[str] = []
    reference: tuple[Path, Grid] | None = None
    for path in [*case.channels, *([case.label] if case.label else [])]:
        grid, found = _file_problem(path, allowed if path == case.label else None)
        if found:
            (blank if found.endswith(_BLANK) else problems).append(found)
        if grid is None:
            continue
        if reference is None:
            reference = (path, grid)
        elif difference := _grid_difference(grid, reference[1]):
            problems.append(
                f"{_short(path)} lies on another grid than {_short(reference[0])}: {difference}. "
                "Resample it onto that image's grid, labels with nearest neighbour."
            )
    return problems if missing_channels and len(blank) < len(case.channels) else blank + problems


_BLANK = "is 0 in every voxel. Remove the case, or export the image again."


def _file_problem(path: Path, allowed: Sequence[int] | None) -> tuple[Grid | None, str | None]:
    """The grid of a readable 3-D file and what is wrong with it; ``allowed`` are label values, None for an image."""
    try:
        grid, array = read_image(path)
    except DatasetError as error:
        return None, str(error)
    found = _intensity_problem(array) if allowed is None else _label_image_problem(array, allowed)
    return grid, f"{_short(path)} {found}" if found else None


def read_image(path: Path) -> tuple[Grid, np.ndarray]:
    """Grid and voxels of an image or a label image; the axes of NIfTI's array are (x, y, z), of others (z, y, x).

    Raises:
      DatasetError: In one line, if the file cannot be read or is no 3-D image of one number per voxel.
    """
    try:
        header = _read_header(path)
        grid = Grid(header.GetSize(), header.GetSpacing(), header.GetOrigin(), header.GetDirection())
        if problem := _header_problem(header) or _grid_problem(grid):
            raise DatasetError(f"{_short(path)} {problem}")
        array = read_voxels(path)
    except DatasetError:  # a ValueError too
        raise
    except READ_ERRORS as error:
        raise DatasetError(
            f"{_short(path)} cannot be read ({reason_of(error)}). The file is cut off, damaged or of another format: "
            "copy or convert it again."
        ) from error
    if array.size != (expected := math.prod(grid.size_vox)):
        raise DatasetError(
            f"{_short(path)} holds {array.size} voxels; expected {expected} on a grid of {grid.size_vox}. The header "
            "is damaged: export the image again."
        )
    return grid, array


def _read_header(path: Path) -> sitk.ImageFileReader:
    reader = sitk.ImageFileReader()
    # Named format: by content alone SimpleITK would also accept a picture that was renamed to .nii.gz.
    reader.SetImageIO("NiftiImageIO" if path.name.endswith(".nii.gz") else "")
    reader.SetFileName(str(path))
    with _SIMPLEITK:
        reader.ReadImageInformation()
    return reader


def read_voxels(path: Path) -> np.ndarray:
    if path.name.endswith(".nii.gz"):
        image = nibabel.load(path)
        size, most = math.prod(image.shape) * image.get_data_dtype().itemsize, _MOST_COMPRESSED * path.stat().st_size  # type: ignore[attr-defined]
        if size > most:  # else that much memory would be asked for
            raise OSError(f"the header says {size} bytes of voxels, the file holds {most} at most")
        return np.asanyarray(image.dataobj)  # type: ignore[attr-defined]
    with _SIMPLEITK:
        return sitk.GetArrayFromImage(sitk.ReadImage(str(path)))


def reason_of(error: Exception) -> str:
    """One line; the last of SimpleITK's, whose lines before name C++ sources."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return re.sub(r"^.*\(0x[0-9a-f]+\): ", "", lines[-1]).rstrip(".") if lines else type(error).__name__


def _intensity_problem(array: np.ndarray) -> str | None:
    if array.dtype.kind == "f":
        bad = array.size - int(np.count_nonzero(np.isfinite(array)))
        if bad:
            return f"has {bad} voxels that are NaN or infinite. Replace them, for example by the background value."
    low = array.min()
    if low == array.max() == 0:
        return _BLANK
    if low == array.max():
        return f"is {low} in every voxel. Remove the case, or export the image again."
    return None


def _label_image_problem(array: np.ndarray, allowed: Sequence[int]) -> str | None:
    unknown = array[~np.isin(array, allowed)]
    if not unknown.size:
        return None
    values = np.unique(unknown)
    shown = ", ".join(f"{value:g}" for value in values[:5]) + (", ..." if values.size > 5 else "")
    return (
        f"holds the label values {shown} in {unknown.size} voxels; dataset.json knows {list(allowed)}. "
        "Correct the label image (labels must not be interpolated) or add the labels to dataset.json."
    )


def _header_problem(header: sitk.ImageFileReader) -> str | None:
    """How an image is not one 3-D array of numbers, or None."""
    axes, components = header.GetDimension(), header.GetNumberOfComponents()
    if axes == 3 and components == 1:
        return None
    return (
        f"has {axes} dimensions of {header.GetSize()} and {components} values per voxel; "
        "expected 3 dimensions and 1 value. Split it into one 3-D file per channel."
    )


def _grid_problem(grid: Grid) -> str | None:
    """What cannot be of a medical image's grid, or None."""
    if not all(_SMALLEST_EDGE_MM <= edge <= _LARGEST_EDGE_MM for edge in grid.spacing_mm):
        return (
            f"has voxels of {_rounded(grid.spacing_mm)} mm; expected edges of {_SMALLEST_EDGE_MM} to "
            f"{_LARGEST_EDGE_MM:g} mm. The header is damaged: export the image again."
        )
    if not np.isfinite([*grid.origin_mm, *grid.direction]).all():
        return (
            f"has origin {grid.origin_mm} and direction {grid.direction}; expected finite numbers. The header is "
            "damaged: export the image again."
        )
    return None


def _grid_difference(grid: Grid, reference: Grid) -> str | None:
    """What differs, or None.

    Equal means: spacing within 0.1 %, direction within 0.001, origin within 1 % of the smallest voxel edge. The
    origin has more room because converters round it to few digits, and a hundredth of a voxel moves no label.
    """
    if grid.size_vox != reference.size_vox:
        return f"size {grid.size_vox} instead of {reference.size_vox}"
    if not np.allclose(grid.spacing_mm, reference.spacing_mm, rtol=_TOLERANCE, atol=0):
        return f"spacing {_rounded(grid.spacing_mm)} mm instead of {_rounded(reference.spacing_mm)} mm"
    if not np.allclose(grid.origin_mm, reference.origin_mm, rtol=0, atol=10 * _TOLERANCE * min(reference.spacing_mm)):
        return f"origin {_rounded(grid.origin_mm)} mm instead of {_rounded(reference.origin_mm)} mm"
    if not np.allclose(grid.direction, reference.direction, rtol=0, atol=_TOLERANCE):
        return f"direction {_rounded(grid.direction)} instead of {_rounded(reference.direction)}"
    return None


def _rounded(values: Sequence[float]) -> tuple[float, ...]:
    return tuple(round(value, 4) for value in values)


def _short(path: Path) -> str:
    return f"{path.parent.name}/{path.name}"
