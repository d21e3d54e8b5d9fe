"""Sites' data sets cut out of larger ones: no patient at two sites, seeded, and either links or boxes round organs.

``python -m fedcmt.data.split -d ID --scheme SCHEME --sites NAME:ID ...`` makes one cut of kind ``partition``.
"""

import argparse
import json
import logging
import os
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fedcmt.data.case_fields import case_field
from fedcmt.data.checks import (
    Case,
    DatasetError,
    channel_names,
    check_dataset,
    find_dataset,
    is_dangling,
    list_training_cases,
    read_dataset_json,
)
from fedcmt.data.organ_boxes import write_organ_boxes
from fedcmt.data.partition import COMMON, ByValue, DataPartition, Dirichlet, Equal, Fractions, Hands, Patient
from fedcmt.data.partition_cut import (
    FOREGROUND_TERTILE,
    FRACTION_KEYS,
    PARTITION_KEYS,
    SCHEMES,
    check_partition,
    check_values,
    partition_cases,
)
from fedcmt.json_file import JsonFileError, read_json, write_json

logger = logging.getLogger(__name__)

Links = Literal["symbolic", "hard"]

_SPEC_FILE, _PARTITION_FILE, _FOLD_FILE = "split.json", "partition.csv", "splits_final.json"
_COMMON_KEYS = ("kind", "source_id", "max_training_cases", "test_fraction", "seed")
_REQUIRED_KEYS = {
    "domains": (*_COMMON_KEYS, "by", "domains"),
    "deal": (*_COMMON_KEYS, "sites"),
    "partition": ("kind", "source_id", "scheme", "sites", "seed"),
    "channels": ("kind", "source_id", "sites"),
}
_OPTIONAL_KEYS = {
    "domains": ("pooled",),
    "deal": ("box_mm",),
    "partition": PARTITION_KEYS,
    "channels": (),
}
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
    """What one data set gets: cases to train on and to test on, and as whole images or as boxes of ``box_mm``.

    Of a partition also cases to validate on, and the cases that all its sites share. ``channels`` are the indices of
    the source's channels that it gets, in its own order; None is all.
    """

    name: str
    train: list[str]
    test: list[str]
    box_mm: Sequence[float] | None = None
    val: Sequence[str] = ()
    common_val: Sequence[str] = ()
    common_test: Sequence[str] = ()
    partition: DataPartition | None = None
    channels: Sequence[int] | None = None

    @property
    def folders(self) -> dict[str, list[str]]:
        """Suffix of ``images`` and ``labels`` to the cases there; without those that would be empty."""
        cases = {
            "Tr": sorted([*self.train, *self.val]),
            "Ts": self.test,
            "CommonVal": list(self.common_val),
            "Common": list(self.common_test),
        }
        return {suffix: ids for suffix, ids in cases.items() if ids}


_Plan = list[tuple[_Source, _Share]]


def make_cuts(source_raw: Path, raw: Path, cohort: Mapping[str, Any], *, links: Links = "symbolic") -> list[Path]:
    """Cut the data sets of a cohort's sites out of larger ones.

    A cohort is ``{"cuts": [cut, ...]}``, or one cut of kind ``domains`` alone. Every cut takes the cases of the
    source's ``imagesTr``, shuffles them, and deals them to sites; each site sets test cases aside before it takes its
    training cases. All cuts have ``source_id``; ``max_training_cases`` per site; ``test_fraction`` of a site's cases,
    in (0, 1); ``seed``; ``partition`` can do without the second and third, ``channels`` without the last three. Further
    keys, by ``kind``:

    - ``domains``: cases are grouped by a field of the source's ``provenance.json`` (e.g. the stored type, which tells
      two intensity domains apart), and each group is dealt to sites of its own. ``by`` (the field); ``domains`` (value
      of the field to the data set names of its sites); ``pooled`` (optional: name of a data set of all these cases,
      for centralised training).
    - ``deal``: one case is one patient, dealt to sites of different tasks. ``sites`` (data set name to
      ``segmentation``: the images as they are, or ``organ_boxes``: see `write_organ_boxes`); ``box_mm`` (edges
      x, y, z of the boxes, needed for ``organ_boxes``).
    - ``partition``: patients are dealt by a scheme of `fedcmt.data.partition`, stratified, with validation cases and
      common cases. ``scheme`` (``equal``, ``proportions``, ``dirichlet`` or ``by``); ``sites`` (data set names in
      order); ``proportions`` (of the sites); ``alpha`` and optionally ``min_cases`` (of ``dirichlet``); ``by`` (a
      field) and ``values`` (its values to data set names). All optional: ``strata`` (fields and
      ``foreground_tertile``; patients are spread evenly over their combinations); ``table`` (CSV with fields that
      provenance.json lacks); ``patients_csv`` or ``patients_regex`` (see `patient_of_case`); the fractions of
      `Fractions` as ``val_fraction`` and so on; ``common_test`` (name of a data set of the common cases); ``pooled``.
      Paths are relative to the source's folder.
    - ``channels``: every site gets all cases, to train on, with its own channels alone. ``sites`` (data set name to
      names of the source's channels, in the order that they are to have). It is for trying sites of different
      sequences on few images, and the only kind that has a patient at several sites.

    Args:
      source_raw: nnUNet_raw folder with the source data sets.
      raw: nnUNet_raw folder to write the sites' data sets into: symbolic links (relative ones if it is ``source_raw``,
        which may then be moved), or boxes as files of their own. What is there already from the same cut is kept.
      cohort: As above.
      links: Kind of the links; hard ones need source and target on one disk.

    Returns:
      The data set folders in the order of the cuts; within ``domains`` by group; the common one and the pooled one
      last.

    Raises:
      DatasetError: If a source is not usable, a domain or a site has too few cases, or a link in a folder that would be
        kept leads to no file; then nothing is written.
      ValueError: If a key is missing, unknown or of no use, a name, an id or a source is given twice, or patients
        cannot be dealt as asked (`PartitionError`); then nothing is written.
      FileExistsError: If a folder is there that this cohort did not make; then nothing is written.
    """
    planned = _plan(source_raw, cohort)
    _check_targets(planned, raw)
    return _write(planned, raw, links)


def dataset_names(cohort: Mapping[str, Any]) -> list[str]:
    """Names of all data sets that a cohort makes, pooled ones included.

    Raises:
      ValueError: As `make_cuts`.
    """
    return [name for cut in _cuts(cohort) for name in _names(cut)]


def _plan(source_raw: Path, cohort: Mapping[str, Any]) -> _Plan:
    make = {
        "domains": _domain_shares,
        "deal": _deal_shares,
        "partition": _partition_shares,
        "channels": _channel_shares,
    }
    planned: _Plan = []
    for cut in _cuts(cohort):
        source = _read_source(source_raw, int(cut["source_id"]))
        shares = make[cut["kind"]](source, cut)
        counts = {share.name: (len(share.train), len(share.test)) for share in shares}
        logger.info("cut %s into (training, test cases) %s", source.folder.name, counts)
        planned += [(source, share) for share in shares]
    return planned


def _check_targets(planned: _Plan, raw: Path) -> None:
    for source, share in planned:
        _check_target(source, share, raw / share.name)


def _write(planned: _Plan, raw: Path, links: Links) -> list[Path]:
    return [_make(source, share, raw / share.name, links) for source, share in planned]


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
    if not (cut["domains"] if kind == "domains" else cut["sites"]):
        raise ValueError(f"cohort: a cut of data set {cut['source_id']} names no sites")
    if kind == "partition":
        check_partition(cut)
    if kind in ("partition", "channels"):
        return
    if not 0 < cut["test_fraction"] < 1:
        raise ValueError(f"cohort: test_fraction is {cut['test_fraction']}; expected a number between 0 and 1")
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
    if cut["kind"] in ("deal", "channels"):
        return list(cut["sites"])
    sites = (
        cut["sites"] if cut["kind"] == "partition" else [name for names in cut["domains"].values() for name in names]
    )
    return [*sites, *(cut[key] for key in ("common_test", "pooled") if key in cut)]


# ---------------------------------------------------------------------------------------------------------------------
# Who gets which cases


def _read_source(source_raw: Path, dataset_id: int) -> _Source:
    folder = find_dataset(source_raw, dataset_id)
    dataset_json = read_dataset_json(folder)
    return _Source(folder, dataset_json, list_training_cases(folder, dataset_json))


def _domain_shares(source: _Source, cut: _Cut) -> list[_Share]:
    field, domains = cut["by"], {value: tuple(names) for value, names in sorted(cut["domains"].items())}
    scheme = ByValue(tuple(name for names in domains.values() for name in names), domains)
    values = case_field(source.folder, str(field))
    patients = [Patient(case, (case,), value=values.get(case)) for case in source.cases]
    check_values(source.folder, field, scheme, patients, patients_per_site=2)
    shares = _test_and_train(scheme.assign(patients, str(cut["seed"])), cut)
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
    patients = [Patient(case, (case,)) for case in source.cases]
    shares = _test_and_train(Equal(tuple(cut["sites"])).assign(patients, f"{cut['seed']}/deal"), cut)
    boxed = [name for name, task in cut["sites"].items() if task == "organ_boxes"]
    return [_Share(s.name, s.train, s.test, cut["box_mm"] if s.name in boxed else None) for s in shares]


def _test_and_train(hands: Hands, cut: _Cut) -> list[_Share]:
    """Shares of patients of one case each."""
    return [_train_and_test(name, [patient.name for patient in hand], cut) for name, hand in hands.items()]


def _train_and_test(name: str, members: Sequence[str], cut: _Cut) -> _Share:
    num_test = max(1, round(len(members) * float(cut["test_fraction"])))
    test, train = members[:num_test], members[num_test:][: int(cut["max_training_cases"])]
    if not train:
        raise DatasetError(
            f"{name}: no training case: of {len(members)} cases {len(test)} are for testing (test_fraction "
            f"{cut['test_fraction']}) and at most {cut['max_training_cases']} for training (max_training_cases)"
        )
    return _Share(name, sorted(train), sorted(test))


def _partition_shares(source: _Source, cut: _Cut) -> list[_Share]:
    made = partition_cases(source.folder, source.cases, source.dataset_json, cut)
    common_val, common_test = made.cases("val", COMMON), made.cases("test", COMMON)

    def share(name: str, site: str | None) -> _Share:
        train, val, test = (made.cases(split, site) for split in ("train", "val", "test"))
        return _Share(name, train, test, None, val, common_val, common_test, made)

    shares = [share(site, site) for site in cut["sites"]]
    if "common_test" in cut:
        shares.append(_Share(cut["common_test"], common_val, common_test, partition=made))
    if "pooled" in cut:
        shares.append(share(cut["pooled"], None))
    return shares


def _channel_shares(source: _Source, cut: _Cut) -> list[_Share]:
    names = channel_names(source.dataset_json)

    def indices(site: str, wanted: Sequence[str]) -> list[int]:
        if not wanted or len(set(wanted)) != len(wanted) or not set(wanted) <= set(names):
            raise DatasetError(
                f"cohort: channels of {site} are {wanted}; expected one or more of {names}, which "
                f"{source.folder.name} has, each once"
            )
        return [names.index(name) for name in wanted]

    cases = sorted(source.cases)
    return [_Share(site, cases, [], channels=indices(site, wanted)) for site, wanted in cut["sites"].items()]


# ---------------------------------------------------------------------------------------------------------------------
# Writing


def _check_target(source: _Source, share: _Share, target: Path) -> None:
    if target.exists() and not _holds(target, _spec(source, share, target)):
        raise FileExistsError(f"{target} is there and was not made by this cut of {source.folder.name}; move it away")
    if dangling := next(filter(is_dangling, sorted(target.glob("*/*"))), None):
        raise DatasetError(
            f"{target}: {dangling.relative_to(target)} is a link to {dangling.readlink()}, where there is no file (any "
            "more); delete this data set's folder, and it is made again from its source"
        )
    same_id = sorted(path.name for path in target.parent.glob(f"{target.name.split('_')[0]}_*") if path.is_dir())
    if others := [name for name in same_id if name != target.name and not name.endswith(".partial")]:
        raise FileExistsError(
            f"{target}: its id is taken by {others}; nnU-Net needs one data set per id. Use another id"
        )


def _spec(source: _Source, share: _Share, target: Path) -> dict[str, Any]:
    """What split.json says of how a data set was cut."""
    # By name where it lies beside the cut, so that a workspace may move.
    where = source.folder.name if source.folder.parent == target.parent else str(source.folder)
    spec: dict[str, Any] = {"source": where, "train": share.train, "test": share.test}
    if share.box_mm is not None:
        spec["box_mm"] = list(share.box_mm)
    if share.channels is not None:
        spec["channels"] = list(share.channels)
    if share.partition is not None:
        spec |= {key: list(getattr(share, key)) for key in ("val", "common_val", "common_test")}
        spec["partition_sha256"] = share.partition.sha256()
    return spec


def _make(source: _Source, share: _Share, target: Path, links: Links) -> Path:
    """Write a share's data set, unless it is there already."""
    if target.exists():
        return target
    partial = target.with_name(target.name + ".partial")
    if partial.exists():
        shutil.rmtree(partial)  # it may be of another cut, whose cases would become this one's
    splits = {suffix: {case: source.cases[case] for case in ids} for suffix, ids in share.folders.items()}
    if share.box_mm is None:
        _link(partial, target.name, source.dataset_json, splits, links, share.channels)
    else:
        check_dataset(source.folder, num_folds=None)  # boxes are read with SimpleITK, which hides damage
        write_organ_boxes(partial, target.name, source.dataset_json, splits, share.box_mm)
    if share.partition is not None:
        _write_partition(partial, share, share.partition)
    write_json(partial / _SPEC_FILE, _spec(source, share, target), indent=2)
    partial.replace(target)
    return target


def _link(
    folder: Path,
    name: str,
    dataset_json: Mapping[str, Any],
    splits: Mapping[str, Mapping[str, Case]],
    links: Links,
    channels: Sequence[int] | None,
) -> None:
    """A data set of links to whole images, of all channels or of some."""
    names, ending = channel_names(dataset_json), dataset_json["file_ending"]
    chosen = range(len(names)) if channels is None else channels
    for split, cases in splits.items():
        for kind in ("images", "labels"):
            (folder / f"{kind}{split}").mkdir(parents=True)
        for case_id, case in cases.items():
            for number, channel in enumerate(chosen):
                link = folder / f"images{split}" / f"{case_id}_{number:04d}{ending}"
                _link_file(link, case.images[channel], links)
            _link_file(folder / f"labels{split}" / case.label.name, case.label, links)
    own = {**dataset_json, "name": name, "numTraining": len(splits["Tr"])}
    own["channel_names"] = {str(number): names[channel] for number, channel in enumerate(chosen)}
    write_json(folder / "dataset.json", own, indent=2)


def _link_file(link: Path, file: Path, links: Links) -> None:
    if links == "symbolic":
        # Relative within one raw folder, so that a workspace may move.
        beside = link.parents[2] == file.parents[2]
        link.symlink_to(os.path.relpath(file, link.parent) if beside else file.resolve())
        return
    try:
        link.hardlink_to(file.resolve())
    except OSError as error:
        raise OSError(
            f"{link}: no hard link to {file} can be made ({error.strerror}); use one disk or symbolic links"
        ) from error


def _write_partition(folder: Path, share: _Share, partition: DataPartition) -> None:
    """The whole partition with its checksum, and the data set's validation cases as nnU-Net's fold 0."""
    (folder / _PARTITION_FILE).write_text(partition.to_csv(), encoding="utf-8", newline="\n")
    (folder / f"{_PARTITION_FILE}.sha256").write_text(f"{partition.sha256()}  {_PARTITION_FILE}\n")
    if share.val:
        fold = {"train": list(share.train), "val": list(share.val)}
        (folder / _FOLD_FILE).write_text(json.dumps([fold], indent=2) + "\n")


def _holds(target: Path, spec: Mapping[str, Any]) -> bool:
    try:
        return read_json(target / _SPEC_FILE) == spec
    except JsonFileError:
        return False


# ---------------------------------------------------------------------------------------------------------------------
# Command line

_ABOUT_SKEW = {
    "none": "Skew: none. The sites' shares are alike in size and mix, so the sites are IID.",
    "quantity": "Skew: quantity. The sites' shares differ in size only, not in mix, so the sites are still IID.",
    "label": "Skew: label. The mix of strata differs between the sites, so the sites are not IID.",
}
_CUT_OPTIONS = (
    *("scheme", "sites", "proportions", "alpha", "min_cases", "strata", "table", "patients_csv", "patients_regex"),
    *("max_training_cases", *FRACTION_KEYS, "common_test", "pooled", "seed"),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    options = _parser().parse_args(arguments)
    try:
        _split(options)
    except (ValueError, OSError) as error:
        print(f"fedcmt.data.split: {error}", file=sys.stderr)
        return 1
    return 0


def _split(options: argparse.Namespace) -> None:
    raw = options.raw or os.environ.get("nnUNet_raw")
    if not raw:
        raise ValueError("nnUNet_raw is not set; set it to the folder of your data sets, or give --raw")
    out = Path(options.out or raw).absolute()
    planned = _plan(Path(raw).absolute(), {"cuts": [_cut_of(options)]})
    _check_targets(planned, out)
    made = planned[0][1].partition
    assert made is not None  # the cut is a partition
    print(_summary(made))
    print(f"{_PARTITION_FILE}: SHA-256 {made.sha256()}")
    if options.dry_run:
        print("Dry run: nothing is written.")
        return
    folders = _write(planned, out, options.links)
    print("\n".join(f"Data set   {folder}" for folder in folders))
    print(f"Partition  {folders[0] / _PARTITION_FILE}, and the same in each of these folders")


def _cut_of(options: argparse.Namespace) -> dict[str, Any]:
    given = {key: getattr(options, key) for key in _CUT_OPTIONS}
    cut = {key: value for key, value in given.items() if value is not None}
    for key in ("table", "patients_csv"):
        if key in cut:
            cut[key] = str(cut[key].absolute())
    if options.field is not None:
        cut["by"] = options.field
    if options.values is not None:
        cut["values"] = _values(options.values, options.sites)
    return {"kind": "partition", "source_id": options.dataset, **cut}


def _values(texts: Sequence[str], sites: Sequence[str]) -> dict[str, list[str]]:
    """``["uint8=A,B"]`` as value to data set names."""
    by_short_name = {site.partition("_")[2]: site for site in sites}
    values: dict[str, list[str]] = {}
    for text in texts:
        value, _, names = text.rpartition("=")
        if not value or value in values:
            raise ValueError(f"--values {text!r}: expected VALUE=NAME or VALUE=NAME,NAME, each value once")
        if unknown := [name for name in names.split(",") if name not in by_short_name]:
            raise ValueError(f"--values {text!r}: {unknown} are not among --sites {list(by_short_name)}")
        values[value] = [by_short_name[name] for name in names.split(",")]
    return values


def _summary(made: DataPartition) -> str:
    """A line per site, its cases by split and by stratum, and what kind of skew that is."""
    width = max(len(site) for site in (*made.sites, "site", COMMON))
    lines = [f"{'site':<{width}}  train    val   test  strata"]
    for site in (*made.sites, *([COMMON] if made.strata(COMMON) else [])):
        counts = "  ".join(f"{len(made.cases(split, site)):>5}" for split in ("train", "val", "test"))
        strata = ", ".join(f"{stratum or 'all'}: {count}" for stratum, count in made.strata(site).items())
        lines.append(f"{site:<{width}}  {counts}  {strata}")
    if unused := sum(row.split == "unused" for row in made.rows):
        lines.append(f"{unused} of {len(made.rows)} cases are not used.")
    return "\n".join([*lines, _ABOUT_SKEW[made.skew]])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fedcmt.data.split",
        description="Split one nnU-Net data set into the data sets of several sites.",
    )
    add = parser.add_argument
    add("-d", "--dataset", type=int, required=True, metavar="ID", help="id of the data set to split")
    add("--scheme", choices=SCHEMES, required=True, help="how patients are dealt to sites")
    add("--sites", type=_site, nargs="+", required=True, metavar="NAME:ID", help="data sets to make, e.g. SiteA:601")
    add("--proportions", type=float, nargs="+", metavar="P", help="proportions: part of each site; the sum is 1")
    add("--alpha", type=float, help="dirichlet: the smaller, the more the sites differ, e.g. 0.5")
    add("--min-cases", type=int, help=f"dirichlet: least cases of a site (default {Dirichlet.min_cases})")
    add("--field", help="by: field of provenance.json or of --table")
    add("--values", nargs="+", metavar="VALUE=NAME[,NAME]", help="by: which sites share a value of the field")
    add("--strata", nargs="+", metavar="FIELD", help=f"spread these evenly: fields, {FOREGROUND_TERTILE}")
    add("--table", type=Path, metavar="CSV", help="fields: a column case or patient, and one per field")
    add("--patients-csv", type=Path, metavar="CSV", help="columns case, patient; default: a case is a patient")
    add("--patients-regex", metavar="PATTERN", help="of a case id, its one group being the patient")
    add("--max-training-cases", type=int, help="most training cases of a site")
    for key, part in zip(FRACTION_KEYS, ("site's share", "site's share", "all cases", "all cases"), strict=True):
        default = getattr(Fractions, key.removesuffix("_fraction"))
        add(f"--{key.replace('_', '-')}", type=float, metavar="F", help=f"part of the {part} (default {default})")
    add("--common-test", type=_site, metavar="NAME:ID", help="also a data set of the common cases alone")
    add("--pooled", type=_site, metavar="NAME:ID", help="also a data set of all sites' cases")
    add("--seed", type=int, default=42, help="decides the split (default 42)")
    add("--raw", type=Path, help="folder of the data set to split (default: nnUNet_raw)")
    add("--out", type=Path, metavar="RAW", help="where the sites' data sets go (default: as --raw)")
    add("--links", choices=("symbolic", "hard"), default="symbolic", help="kind of the links to the images")
    add("--dry-run", action="store_true", help="show the split, write nothing")
    return parser


def _site(text: str) -> str:
    """``SiteA:601`` as ``Dataset601_SiteA``."""
    match = re.fullmatch(r"(\w+):(\d{1,3})", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r}: expected NAME:ID, e.g. SiteA:601")
    return f"Dataset{int(match[2]):03d}_{match[1]}"


if __name__ == "__main__":
    sys.exit(main())
