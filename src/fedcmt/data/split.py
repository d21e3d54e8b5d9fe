"""Sites cut out of one data set: disjoint cases, seeded, files linked rather than copied."""

import json
import logging
import random
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedcmt.data.checks import DatasetError, find_dataset, list_cases, read_dataset_json
from fedcmt.json_file import JsonFileError, read_json, write_json

logger = logging.getLogger(__name__)

_SPEC_FILE = "split.json"
_COHORT_KEYS = ("source_id", "by", "domains", "pooled", "max_training_cases", "test_fraction", "seed")


def split_by_domain(source_raw: Path, raw: Path, cohort: Mapping[str, Any]) -> list[Path]:
    """Cut one data set into a domain's sites, and pool the same cases once more for centralised training.

    Cases are grouped by a field of the data set's ``provenance.json`` (e.g. the stored type, which tells two intensity
    domains apart), shuffled, and dealt to the domain's sites; each site sets test cases aside before it takes its
    training cases.

    Args:
      source_raw: nnUNet_raw folder with the source data set.
      raw: nnUNet_raw folder to write the sites' data sets into, as symbolic links.
      cohort: ``source_id``; ``by`` (field of provenance.json); ``domains`` (value of the field to the data set names
        of its sites); ``pooled`` (data set name); ``max_training_cases`` per site; ``test_fraction`` of a site's cases
        in (0, 1); ``seed``.

    Returns:
      The data set folders, the pooled one last.

    Raises:
      DatasetError: If the source is not usable, or a domain or a site has too few cases; then nothing is written.
      ValueError: If a key is missing, or one data set name is given twice.
      FileExistsError: If a folder is there that this cohort did not make.
    """
    _check_cohort(cohort)
    source = find_dataset(source_raw, int(cohort["source_id"]))
    dataset_json = read_dataset_json(source)
    cases = list_cases(source, dataset_json)
    values = _provenance(source, str(cohort["by"]))
    shares: dict[str, tuple[list[str], list[str]]] = {}
    for value, names in sorted(cohort["domains"].items()):
        members = sorted(case for case in cases if values.get(case) == value)
        if len(members) < 2 * len(names):
            there = sorted({repr(v) for v in values.values()})
            raise DatasetError(
                f"{source}: {len(members)} cases with {cohort['by']} = {value!r} for {len(names)} sites, which need 2 "
                f"each; provenance.json knows {cohort['by']} = {', '.join(there)}"
            )
        random.Random(f"{cohort['seed']}/{value}").shuffle(members)
        for index, name in enumerate(names):
            shares[name] = _train_and_test(name, members[index :: len(names)], cohort)
    train = [case for part, _ in shares.values() for case in part]
    test = [case for _, part in shares.values() for case in part]
    shares[str(cohort["pooled"])] = (train, test)
    logger.info("cut %s into %s", source.name, {name: (len(a), len(b)) for name, (a, b) in shares.items()})
    return [_link(source, raw / name, dataset_json, cases, *share) for name, share in shares.items()]


def _check_cohort(cohort: Mapping[str, Any]) -> None:
    if missing := [key for key in _COHORT_KEYS if key not in cohort]:
        raise ValueError(f"cohort: keys {missing} are missing; expected are {list(_COHORT_KEYS)}")
    names = [name for sites in cohort["domains"].values() for name in sites] + [str(cohort["pooled"])]
    if len(set(names)) != len(names):
        raise ValueError(f"cohort: each data set needs a name of its own, domains and pooled give {names}")


def _train_and_test(name: str, members: Sequence[str], cohort: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    num_test = max(1, round(len(members) * float(cohort["test_fraction"])))
    test, train = members[:num_test], members[num_test:][: int(cohort["max_training_cases"])]
    if not train:
        raise DatasetError(
            f"{name}: no training case: of {len(members)} cases {len(test)} are for testing (test_fraction "
            f"{cohort['test_fraction']}) and at most {cohort['max_training_cases']} for training (max_training_cases)"
        )
    return sorted(train), sorted(test)


def _provenance(source: Path, field: str) -> dict[str, object]:
    """Case id to its value of a field; None for a case without."""
    path = source / "provenance.json"
    if not path.is_file():
        raise DatasetError(f"{path}: file not found; it says of which domain each case is")
    return {row["case"]: row.get(field) for row in json.loads(path.read_text())}


def _link(
    source: Path,
    target: Path,
    dataset_json: Mapping[str, Any],
    cases: Mapping[str, Sequence[Path]],
    train: list[str],
    test: list[str],
) -> Path:
    """A data set of links; one that is already there must be the same cut."""
    spec = {"source": str(source), "train": train, "test": test}
    if target.exists():
        if _holds(target, spec):
            return target
        raise FileExistsError(f"{target} is there and was not made by this cut of {source.name}; move it away")
    partial = target.with_name(target.name + ".partial")
    if partial.exists():
        shutil.rmtree(partial)  # links only; they may be those of another cut, which would become this one's cases
    ending = dataset_json["file_ending"]
    for split, members in (("Tr", train), ("Ts", test)):
        for kind in ("images", "labels"):
            (partial / f"{kind}{split}").mkdir(parents=True)
        for case in members:
            for file in cases[case]:
                (partial / f"images{split}" / file.name).symlink_to(file.resolve())
            label = case + ending
            (partial / f"labels{split}" / label).symlink_to((source / "labelsTr" / label).resolve())
    own = {**dataset_json, "name": target.name, "numTraining": len(train)}
    write_json(partial / "dataset.json", own, indent=2)
    write_json(partial / _SPEC_FILE, spec, indent=2)
    partial.replace(target)
    return target


def _holds(target: Path, spec: Mapping[str, Any]) -> bool:
    try:
        return read_json(target / _SPEC_FILE) == spec
    except JsonFileError:
        return False
