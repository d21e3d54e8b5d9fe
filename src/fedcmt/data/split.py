"""Sites' data sets cut out of larger ones: no patient at two sites, seeded, and either links or boxes round organs."""

import json
import logging
import random
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedcmt.data.checks import Case, DatasetError, check_dataset, find_dataset, list_training_cases, read_dataset_json
from fedcmt.data.organ_boxes import write_organ_boxes
from fedcmt.json_file import JsonFileError, read_json, write_json

logger = logging.getLogger(__name__)

_SPEC_FILE = "split.json"
_COMMON_KEYS = ("kind", "source_id", "max_training_cases", "test_fraction", "seed")
_REQUIRED_KEYS = {"domains": (*_COMMON_KEYS, "by", "domains"), "deal": (*_COMMON_KEYS, "sites")}
_OPTIONAL_KEYS = {"domains": ("pooled",), "deal": ("box_mm",)}
_TASKS = ("segmentation", "organ_boxes")

_Cut = Mapping[str, Any]


@dataclass(frozen=True)
class _Source:
    """The data set that is cut."""

    folder: Path
    dataset_json: Mapping[str, Any]
    cases: Mapping[str, Case]


@dataclass(frozen=True)
class _Share:
    """What one site gets: patients to train on, patients to test on, and as whole images or as boxes of ``box_mm``."""

    name: str
    train: list[str]
    test: list[str]
    box_mm: Sequence[float] | None = None


def make_cuts(source_raw: Path, raw: Path, cohort: Mapping[str, Any]) -> list[Path]:
    """Cut the data sets of a cohort's sites out of larger ones.

    A cohort is ``{"cuts": [cut, ...]}``, or one cut of kind ``domains`` alone. Every cut takes the cases of the
    source's ``imagesTr``, shuffles them, and deals them in turn to sites; each site sets test cases aside before it
    takes its training cases. All cuts have ``source_id``; ``max_training_cases`` per site; ``test_fraction`` of
    a site's cases, in (0, 1); ``seed``. Further keys, by ``kind``:

    - ``domains``: cases are grouped by a field of the source's ``provenance.json`` (e.g. the stored type, which tells
      two intensity domains apart), and each group is dealt to sites of its own. ``by`` (the field); ``domains`` (value
      of the field to the data set names of its sites); ``pooled`` (optional: name of a data set of all these cases,
      for centralised training).
    - ``deal``: one case is one patient, dealt to sites of different tasks. ``sites`` (data set name to
      ``segmentation``: the images as they are, or ``organ_boxes``: see `write_organ_boxes`); ``box_mm`` (edges
      x, y, z of the boxes, needed for ``organ_boxes``).

    Args:
      source_raw: nnUNet_raw folder with the source data sets.
      raw: nnUNet_raw folder to write the sites' data sets into: symbolic links, or boxes as files of their own. What
        is there already from the same cut is kept.
      cohort: As above.

    Returns:
      The data set folders in the order of the cuts; within ``domains`` by group, the pooled one last.

    Raises:
      DatasetError: If a source is not usable, or a domain or a site has too few cases; then nothing is written.
      ValueError: If a key is missing, unknown or of no use, or a name, an id or a source is given twice.
      FileExistsError: If a folder is there that this cohort did not make.
    """
    cuts = _cuts(cohort)
    planned: list[tuple[_Source, _Share]] = []
    for cut in cuts:
        source = _read_source(source_raw, int(cut["source_id"]))
        shares = _domain_shares(source, cut) if cut["kind"] == "domains" else _deal_shares(source, cut)
        counts = {share.name: (len(share.train), len(share.test)) for share in shares}
        logger.info("cut %s into (training, test cases) %s", source.folder.name, counts)
        planned += [(source, share) for share in shares]
    return [_make(source, share, raw / share.name) for source, share in planned]


def dataset_names(cohort: Mapping[str, Any]) -> list[str]:
    """Names of all data sets that a cohort makes, pooled ones included.

    Raises:
      ValueError: As `make_cuts`.
    """
    return [name for cut in _cuts(cohort) for name in _names(cut)]


# ---------------------------------------------------------------------------------------------------------------------
# Reading a cohort


def _cuts(cohort: Mapping[str, Any]) -> list[_Cut]:
    """The checked cuts of either form."""
    cuts = cohort.get("cuts", [{"kind": "domains", **cohort}])
    if ("cuts" in cohort and len(cohort) > 1) or not isinstance(cuts, list) or not cuts:
        raise ValueError(f"cohort: expected either one cut or {{'cuts': [cut, ...]}} alone, got {dict(cohort)}")
    for cut in cuts:
        _check_cut(cut)
    names = [name for cut in cuts for name in _names(cut)]
    if bad := [name for name in names if not re.fullmatch(r"Dataset\d{3}_\w+", name)]:
        raise ValueError(f"cohort: {bad} are no data set names; expected names such as 'Dataset601_SiteA'")
    if len({name.split("_")[0] for name in names}) != len(names):
        raise ValueError(f"cohort: each data set needs a name and an id of its own, got {names}")
    sources = [int(cut["source_id"]) for cut in cuts]
    if len(set(sources)) != len(sources):
        raise ValueError(
            f"cohort: source_id {sources} are not all different; cut each source once, else a patient is at two sites"
        )
    return cuts


def _check_cut(cut: _Cut) -> None:
    kind = cut.get("kind")
    if kind not in _REQUIRED_KEYS:
        raise ValueError(f"cohort: kind is {kind!r}; expected one of {list(_REQUIRED_KEYS)}")
    required, known = _REQUIRED_KEYS[kind], (*_REQUIRED_KEYS[kind], *_OPTIONAL_KEYS[kind])
    if missing := [key for key in required if key not in cut]:
        raise ValueError(f"cohort: keys {missing} are missing; a cut of kind {kind!r} needs {list(required)}")
    if unknown := [key for key in cut if key not in known]:
        raise ValueError(f"cohort: unknown keys {unknown}; a cut of kind {kind!r} knows {list(known)}")
    if not 0 < cut["test_fraction"] < 1:
        raise ValueError(f"cohort: test_fraction is {cut['test_fraction']}; expected a number between 0 and 1")
    if not (cut["domains"] if kind == "domains" else cut["sites"]):
        raise ValueError(f"cohort: a cut of data set {cut['source_id']} names no sites")
    if kind == "deal":
        _check_tasks(cut)


def _check_tasks(cut: _Cut) -> None:
    if unknown := {name: task for name, task in cut["sites"].items() if task not in _TASKS}:
        raise ValueError(f"cohort: sites {unknown}: expected one of {list(_TASKS)}")
    box_mm = cut.get("box_mm")
    if "organ_boxes" not in cut["sites"].values():
        if box_mm is not None:
            raise ValueError(f"cohort: box_mm is {box_mm}, but no site is of organ_boxes; remove it")
    elif not isinstance(box_mm, list) or len(box_mm) != 3 or not all(mm > 0 for mm in box_mm):
        raise ValueError(f"cohort: box_mm is {box_mm}; expected three positive numbers, the edges of a box in mm")


def _names(cut: _Cut) -> list[str]:
    if cut["kind"] == "deal":
        return list(cut["sites"])
    return [
        *(name for sites in cut["domains"].values() for name in sites),
        *([cut["pooled"]] if "pooled" in cut else []),
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Who gets which cases


def _read_source(source_raw: Path, dataset_id: int) -> _Source:
    folder = find_dataset(source_raw, dataset_id)
    dataset_json = read_dataset_json(folder)
    return _Source(folder, dataset_json, list_training_cases(folder, dataset_json))


def _domain_shares(source: _Source, cut: _Cut) -> list[_Share]:
    values = _provenance(source.folder, str(cut["by"]))
    shares: list[_Share] = []
    for value, names in sorted(cut["domains"].items()):
        members = [case for case in source.cases if values.get(case) == value]
        if len(members) < 2 * len(names):
            there = sorted({repr(v) for v in values.values()})
            raise DatasetError(
                f"{source.folder}: {len(members)} cases with {cut['by']} = {value!r} for {len(names)} sites, which "
                f"need 2 each; provenance.json knows {cut['by']} = {', '.join(there)}"
            )
        shares += _deal(members, names, cut, stream=str(value))
    if "pooled" in cut:
        train = [case for share in shares for case in share.train]
        test = [case for share in shares for case in share.test]
        shares.append(_Share(cut["pooled"], train, test))
    return shares


def _deal_shares(source: _Source, cut: _Cut) -> list[_Share]:
    if len(source.cases) < 2 * len(cut["sites"]):
        raise DatasetError(
            f"{source.folder}: {len(source.cases)} cases for {len(cut['sites'])} sites, which need 2 each; "
            "name fewer sites"
        )
    shares = _deal(list(source.cases), list(cut["sites"]), cut, stream="deal")
    boxed = [name for name, task in cut["sites"].items() if task == "organ_boxes"]
    return [_Share(s.name, s.train, s.test, cut["box_mm"] if s.name in boxed else None) for s in shares]


def _deal(cases: Iterable[str], names: Sequence[str], cut: _Cut, stream: str) -> list[_Share]:
    """Shuffle cases and hand them out in turn."""
    shuffled = sorted(cases)
    random.Random(f"{cut['seed']}/{stream}").shuffle(shuffled)
    return [_train_and_test(name, shuffled[index :: len(names)], cut) for index, name in enumerate(names)]


def _train_and_test(name: str, members: Sequence[str], cut: _Cut) -> _Share:
    num_test = max(1, round(len(members) * float(cut["test_fraction"])))
    test, train = members[:num_test], members[num_test:][: int(cut["max_training_cases"])]
    if not train:
        raise DatasetError(
            f"{name}: no training case: of {len(members)} cases {len(test)} are for testing (test_fraction "
            f"{cut['test_fraction']}) and at most {cut['max_training_cases']} for training (max_training_cases)"
        )
    return _Share(name, sorted(train), sorted(test))


def _provenance(source: Path, field: str) -> dict[str, object]:
    """Case id to its value of a field; None for a case without."""
    path = source / "provenance.json"
    if not path.is_file():
        raise DatasetError(f"{path}: file not found; it says of which domain each case is")
    return {row["case"]: row.get(field) for row in json.loads(path.read_text())}


# ---------------------------------------------------------------------------------------------------------------------
# Writing


def _make(source: _Source, share: _Share, target: Path) -> Path:
    """Write a share's data set; one that is already there must be the same cut."""
    # By name where it lies beside the cut, so that a workspace may move.
    where = source.folder.name if source.folder.parent == target.parent else str(source.folder)
    spec: dict[str, Any] = {"source": where, "train": share.train, "test": share.test}
    if share.box_mm is not None:
        spec["box_mm"] = list(share.box_mm)
    if target.exists():
        if _holds(target, spec):
            return target
        raise FileExistsError(f"{target} is there and was not made by this cut of {source.folder.name}; move it away")
    partial = target.with_name(target.name + ".partial")
    if partial.exists():
        shutil.rmtree(partial)  # it may be of another cut, whose cases would become this one's
    splits = {
        "Tr": {case: source.cases[case] for case in share.train},
        "Ts": {case: source.cases[case] for case in share.test},
    }
    if share.box_mm is None:
        _link(partial, target.name, source.dataset_json, splits)
    else:
        check_dataset(source.folder, num_folds=None)  # boxes are read with SimpleITK, which hides damage
        write_organ_boxes(partial, target.name, source.dataset_json, splits, share.box_mm)
    write_json(partial / _SPEC_FILE, spec, indent=2)
    partial.replace(target)
    return target


def _link(folder: Path, name: str, dataset_json: Mapping[str, Any], splits: Mapping[str, Mapping[str, Case]]) -> None:
    """A data set of links to whole images."""
    for split, cases in splits.items():
        for kind in ("images", "labels"):
            (folder / f"{kind}{split}").mkdir(parents=True)
        for case in cases.values():
            for file in case.images:
                (folder / f"images{split}" / file.name).symlink_to(file.resolve())
            (folder / f"labels{split}" / case.label.name).symlink_to(case.label.resolve())
    own = {**dataset_json, "name": name, "numTraining": len(splits["Tr"])}
    write_json(folder / "dataset.json", own, indent=2)


def _holds(target: Path, spec: Mapping[str, Any]) -> bool:
    try:
        return read_json(target / _SPEC_FILE) == spec
    except JsonFileError:
        return False
