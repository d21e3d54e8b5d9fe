"""Which class each case of a data set is of, for sites that classify whole images."""

import csv
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedcmt.data.checks import (
    READ_ERRORS,
    DatasetError,
    list_cases,
    list_training_cases,
    raise_if,
    read_voxels,
    reason_of,
)
from fedcmt.json_file import JsonFileError, read_json

logger = logging.getLogger(__name__)

SOURCES = ("classes.json", "classes.csv", "majority")
"""Where classes come from: a file beside dataset.json, or each case's label with most voxels."""

UNKNOWN = -1
"""The class index of a case whose class is not known."""

_JSON_KEYS = ["classes", "cases"]
_CSV_COLUMNS = ["case", "class"]


@dataclass(frozen=True)
class CaseClasses:
    """The classes of a data set.

    Attributes:
      names: Class names in the order of their indices.
      cases: Case id, of imagesTr and of imagesTs, to class index; -1 where the class is not known.
    """

    names: tuple[str, ...]
    cases: Mapping[str, int]


def read_classes(folder: Path, dataset_json: Mapping, source: str) -> CaseClasses:
    """Read and check the class of every case, training and test.

    - ``classes.json``: ``{"classes": [name, ...], "cases": {case: index}}``; null is a class not known.
    - ``classes.csv``: columns ``case,class`` with the class's name; an empty cell is a class not known. Classes are in
      the alphabetical order of their names.
    - ``majority``: the foreground label with most voxels in the case's whole label image, of two with equally many the
      one of the lower value; classes are the labels in the order of their values, without background and ignore. Not
      known without any foreground, or for a test case without a label image.

    Args:
      folder: The dataset folder.
      dataset_json: As from ``read_dataset_json``.
      source: One of ``SOURCES``.

    Raises:
      DatasetError: Lists every problem with the file, its class names, and the cases it holds or lacks; also if
        a class has no training case. For ``majority``: if the labels are regions, or a label image cannot be read.
      ValueError: If the source is none of ``SOURCES``.
    """
    if source not in SOURCES:
        raise ValueError(f"source of classes {source!r}: expected one of {list(SOURCES)}")
    training = list(list_training_cases(folder, dataset_json))
    test = list(list_cases(folder, dataset_json, "imagesTs")) if (folder / "imagesTs").is_dir() else []
    if source == "majority":
        classes, problems = _majority(folder, dataset_json, training, test)
    else:
        classes, problems = _read_file(folder, source)
        problems += _case_problems(source, classes, training, test)
    problems += _class_problems(source, classes, training)
    raise_if(folder, problems)
    return classes


def _read_file(folder: Path, source: str) -> tuple[CaseClasses, list[str]]:
    """The classes of one of two possible files, and what is wrong; the other file says nothing, if it is there too."""
    other = "classes.csv" if source == "classes.json" else "classes.json"
    there = (folder / other).is_file()
    if not (folder / source).is_file():
        remedy = f'set the site\'s "classes" to "{other}", which is there' if there else "write it as in docs/data.md"
        raise DatasetError(f"{folder / source}: file not found; {remedy}.")
    if there:
        logger.warning('%s: %s is there as well and is not read; the site\'s "classes" is %s', folder, other, source)
    return (_read_json if source == "classes.json" else _read_csv)(folder / source)


def _read_json(path: Path) -> tuple[CaseClasses, list[str]]:
    """The classes that can be understood, and what is wrong with the others."""
    try:
        content = read_json(path)
    except JsonFileError as error:
        raise DatasetError(f"{error}. Write it as in docs/data.md.") from error
    names, cases = content.get("classes"), content.get("cases")
    if sorted(content) != sorted(_JSON_KEYS) or not isinstance(names, list) or not isinstance(cases, dict):
        raise DatasetError(
            f"{path}: expected the keys 'classes' (a list of names) and 'cases' (case to index) and no other, found "
            f"{ {key: type(value).__name__ for key, value in content.items()} }. Write it as in docs/data.md."
        )
    valid = range(len(names))
    problems = [
        f"classes.json: case {case!r} has class {index!r}; expected an index from 0 to {len(names) - 1}, or null. "
        "Correct it."
        for case, index in cases.items()
        if index is not None and (isinstance(index, bool) or not isinstance(index, int) or index not in valid)
    ]
    # An index that is wrong was named above; naming its class as one without cases too would be noise.
    known = {case: index if type(index) is int and index in valid else UNKNOWN for case, index in cases.items()}
    return CaseClasses(tuple(names), known), problems


def _read_csv(path: Path) -> tuple[CaseClasses, list[str]]:
    """The classes that can be understood, and what is wrong with the others."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:  # spreadsheets begin UTF-8 files with a mark
            header, *rows = [row for row in csv.reader(file, strict=True) if row] or [[]]
    except (UnicodeDecodeError, csv.Error) as error:
        raise DatasetError(f"{path}: not a CSV file in UTF-8 ({error}). Export it again.") from error
    if header != _CSV_COLUMNS:
        raise DatasetError(f"{path}: the columns are {header}; expected {_CSV_COLUMNS}. Correct the first line.")
    problems = [
        f"classes.csv: {row} has {len(row)} cells; expected a case and its class. Correct it."
        for row in rows
        if len(row) != len(_CSV_COLUMNS)
    ]
    complete = [(row[0], row[1]) for row in rows if len(row) == len(_CSV_COLUMNS)]
    problems += [
        f"classes.csv: case {case!r} stands there {count} times. Keep one line."
        for case, count in Counter(case for case, _ in complete).items()
        if count > 1
    ]
    names = sorted({name for _, name in complete if name})
    return CaseClasses(tuple(names), {c: names.index(n) if n else UNKNOWN for c, n in complete}), problems


def _majority(
    folder: Path, dataset_json: Mapping, training: Sequence[str], test: Sequence[str]
) -> tuple[CaseClasses, list[str]]:
    labels = {name: value for name, value in dataset_json["labels"].items() if name not in ("background", "ignore")}
    if regions := [name for name, value in labels.items() if not isinstance(value, int)]:
        raise DatasetError(
            f"{folder / 'dataset.json'}: labels {regions} are regions, so a voxel has no one class. "
            "Write classes.json, as in docs/data.md."
        )
    values, ending = sorted(labels.values()), dataset_json["file_ending"]
    paths = {case: folder / "labelsTr" / f"{case}{ending}" for case in training}
    paths |= {case: folder / "labelsTs" / f"{case}{ending}" for case in test}
    cases, problems = {}, []
    for case, path in paths.items():
        try:
            # Only test cases can be without: list_training_cases has seen to the others.
            cases[case] = _most_voxels(read_voxels(path), values) if path.is_file() else UNKNOWN
        except READ_ERRORS as error:
            problems.append(
                f"{path.parent.name}/{path.name} cannot be read ({reason_of(error)}). Copy or convert it again."
            )
    return CaseClasses(tuple(sorted(labels, key=lambda name: labels[name])), cases), problems


def _most_voxels(label: np.ndarray, values: Sequence[int]) -> int:
    """Index of the value with most voxels, the first of equals; -1 if there is none of them."""
    counts = [int(np.count_nonzero(label == value)) for value in values]
    return int(np.argmax(counts)) if any(counts) else UNKNOWN


def _case_problems(source: str, classes: CaseClasses, training: Sequence[str], test: Sequence[str]) -> list[str]:
    """Cases that only the file or only the folders know."""
    nothing = "null" if source == "classes.json" else "an empty cell"
    problems = [
        f"{source}: case {case!r} of {images} is missing. Add it, with {nothing} if its class is not known."
        for images, cases in (("imagesTr", training), ("imagesTs", test))
        for case in cases
        if case not in classes.cases
    ]
    return problems + [
        f"{source}: case {case!r} has no image in imagesTr or imagesTs. Remove it or add the images."
        for case in classes.cases
        if case not in {*training, *test}
    ]


def _class_problems(source: str, classes: CaseClasses, training: Sequence[str]) -> list[str]:
    """Names that are no names, and classes that cannot be learnt."""
    names = classes.names
    if bad := [name for name in names if not isinstance(name, str) or not name or name != name.strip()]:
        return [f"{source}: class names {bad}; expected texts that neither begin nor end with a blank. Correct them."]
    if len(set(names)) != len(names):
        return [f"{source}: class names {list(names)} repeat a name. Give each class its own."]
    if len(names) < 2:
        return [f"{source}: the classes are {list(names)}; expected at least 2. Add one, or use a segmentation task."]
    found = {classes.cases.get(case, UNKNOWN) for case in training} - {UNKNOWN}
    if not found:
        return [f"{source}: the class of no training case is known. Give at least one for each of {list(names)}."]
    return [
        f"{source}: class {name!r} has no training case, so it cannot be learnt. Add a case or remove the class."
        for index, name in enumerate(names)
        if index not in found
    ]
