"""Results of a job as plain-text tables."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

_MEGABYTE = 1_000_000
_NONE = "-"
_MOST_ABSENCES = 3
_LONGEST_REASON = 120


class _Column(NamedTuple):
    title: str
    of: Callable[[Mapping], float | None]  # its value in a ``test``
    decimals: int = 4


def results_table(results: Mapping) -> str:
    """The results of a job as aligned text.

    Per set of labels there is a table of Dice and one of the other scores, then one table for classification sites; the
    same follows under ``Common test set`` if a site has ``common``.

    Args:
      results: What ``results.json`` holds. Read are ``job``, ``engine``, ``seed``, ``rounds``, ``seconds`` (the line
        above the tables, each optional), ``sites`` (name -> ``task``, ``bytes_sent``, ``bytes_received``, ``test``,
        optionally ``common``), ``centralised`` (optional, a ``test`` alone), ``participation`` (optional, site ->
        ``asked``, ``took_part``, ``absent``), ``failed`` (optional, site -> why it has no results) and ``privacy``
        (optional, as `ServerPrivacy.summary` gives it). ``test`` is what `FolderScores.summary` gives of a segmentation
        site (``cases``, ``mean_dice`` and ``dice`` suffice), ``{cases, accuracy, balanced_accuracy, auc}`` of a
        classification site, or None. ``common`` has the same form.

    Returns:
      Ratios with four decimals, HD95 in mm with two, traffic in MB (10^6 bytes); ``-`` where there is none. A ``mean``
      row is the mean over the sites of its table that have scores. Sites without scores stand in the first table of
      their task. The scores beside Dice, means over labels, are left out where no site of the table has any.
    """
    blocks = [_headline(results)] if _headline(results) else []
    blocks += _tables(results["sites"], results.get("centralised"))
    common = {
        name: {"task": site.get("task"), "test": site["common"]}
        for name, site in results["sites"].items()
        if site.get("common")
    }
    if common:
        first, *others = _tables(common, None)
        blocks += [f"Common test set\n{first}", *others]
    if results.get("participation"):
        blocks.append(_participation_line(results["participation"], results.get("failed", {})))
    if results.get("privacy"):
        blocks.append(_privacy_line(results["privacy"]))
    return "\n\n".join(blocks) + "\n"


def learning_line(results: Mapping) -> str:
    """Each site's score on its validation patches before its first step and after its last, as one line of text.

    Args:
      results: As for `results_table`; read are the sites' ``validation_patches`` (``score``, ``first``, ``last``).
    """
    parts = []
    for name, site in results["sites"].items():
        patches = site.get("validation_patches", {})
        if "first" in patches:
            parts.append(f"{name} {patches['score']} {_number(patches['first'])} -> {_number(patches['last'])}")
    return ", ".join(parts)


def _participation_line(participation: Mapping[str, Mapping], failed: Mapping[str, str]) -> str:
    """In how many of its rounds each site took part, and why not in the others."""
    parts = [f"{site} {entry['took_part']}/{entry['asked']}{_absences(entry)}" for site, entry in participation.items()]
    line = f"Rounds taken part: {', '.join(parts)}"
    if failed:
        line += "\nWithout results: " + ", ".join(f"{site} ({_shortened(why)})" for site, why in failed.items())
    return line


def _absences(entry: Mapping) -> str:
    """The first rounds without the site, in brackets; nothing if there is none."""
    absent = list(entry["absent"].items())
    told = [f"round {number}: {_shortened(reason)}" for number, reason in absent[:_MOST_ABSENCES]]
    if len(absent) > _MOST_ABSENCES:
        told.append(f"{len(absent) - _MOST_ABSENCES} more")
    return f" ({'; '.join(told)})" if told else ""


def _shortened(reason: str) -> str:
    return reason if len(reason) <= _LONGEST_REASON else reason[:_LONGEST_REASON] + "…"


def _privacy_line(privacy: Mapping) -> str:
    """What the training gave away, in one sentence, and what that leaves out."""
    if "statement" in privacy:
        return f"privacy: {privacy['mode']}, epsilon null: {privacy['statement']}"
    line = (
        f"privacy: {privacy['mode']}, epsilon {privacy['epsilon']:.3f} at delta {privacy['delta']:g} "
        f"({privacy['accountant']}), protects: {privacy['protects']}"
    )
    if privacy["noise"] == "seeded":
        line += "; the noise was seeded, for a simulation: no guarantee against whoever knows the seed"
    if privacy["not_covered"]:
        line += f"; not covered: {', '.join(entry.partition(':')[0] for entry in privacy['not_covered'])}"
    return line + (f"\nstopped: {privacy['stopped']}" if privacy["stopped"] else "")


def _headline(results: Mapping) -> str:
    parts = [f"{key} {results[key]}" for key in ("job", "engine", "seed", "rounds") if results.get(key) is not None]
    if results.get("seconds") is not None:
        parts.append(f"{results['seconds']:.1f} s")
    return ", ".join(parts)


def _tables(sites: Mapping[str, Mapping], centralised: Mapping | None) -> list[str]:
    """The tables of the sites' ``test``: of segmentation, then of classification."""
    segmentation = {name: site for name, site in sites.items() if site.get("task") != "classification"}
    classification = {name: site for name, site in sites.items() if site.get("task") == "classification"}
    pooled_is_classifier = centralised is not None and "accuracy" in centralised
    tables = _segmentation_tables(segmentation, None if pooled_is_classifier else centralised)
    if classification:
        tables.append(_classification_table(classification, centralised if pooled_is_classifier else None))
    return tables


def _segmentation_tables(sites: Mapping[str, Mapping], centralised: Mapping | None) -> list[str]:
    groups: dict[tuple[str, ...], dict[str, Mapping]] = {}
    for name, site in sites.items():
        if _scored(site):
            groups.setdefault(tuple(site["test"]["dice"]), {})[name] = site
    pooled = tuple(centralised["dice"]) if centralised else None
    if pooled is not None:
        groups.setdefault(pooled, {})
    if sites and not groups:
        groups[()] = {}
    tables = []
    for number, (labels, members) in enumerate(groups.items()):
        unscored = {name for name, site in sites.items() if not _scored(site)} if number == 0 else set()
        rows = {name: site for name, site in sites.items() if name in members or name in unscored}
        own_centralised = centralised if labels == pooled else None
        tables.append(_dice_table(labels, rows, own_centralised))
        tests = [site["test"] for site in members.values()] + ([own_centralised] if own_centralised else [])
        if any("hd95" in test for test in tests):
            tables.append(_other_scores_table(members, own_centralised))
    return tables


def _dice_table(labels: Sequence[str], sites: Mapping[str, Mapping], centralised: Mapping | None) -> str:
    columns = [*(_Column(label, _dice_of(label)) for label in labels), _Column("mean Dice", _score("mean_dice"))]
    return _table(columns, sites, centralised, _has_traffic(sites))


def _other_scores_table(sites: Mapping[str, Mapping], centralised: Mapping | None) -> str:
    columns = [
        _Column("mean IoU", _mean_over_labels("iou")),
        _Column("sensitivity", _mean_over_labels("sensitivity")),
        _Column("PPV", _mean_over_labels("ppv")),
        _Column("HD95 mm", _mean_over_labels("hd95"), decimals=2),
    ]
    return _table(columns, sites, centralised)


def _classification_table(sites: Mapping[str, Mapping], centralised: Mapping | None) -> str:
    columns = [
        _Column("accuracy", _score("accuracy")),
        _Column("balanced accuracy", _score("balanced_accuracy")),
        _Column("AUC", _score("auc")),
    ]
    return _table(columns, sites, centralised, _has_traffic(sites))


def _table(
    columns: Sequence[_Column], sites: Mapping[str, Mapping], centralised: Mapping | None, with_traffic: bool = False
) -> str:
    """One table: a row per site, their mean if at least two have scores, and the model of the pooled data."""
    traffic = ["MB sent", "MB received"] if with_traffic else []
    rows = [["site", "cases", *(column.title for column in columns), *traffic]]
    for name, site in sites.items():
        cells = [name, *_test_cells(site.get("test") if _scored(site) else None, columns)]
        rows.append(cells + [_megabytes(site.get(key)) for key in ("bytes_sent", "bytes_received")][: len(traffic)])
    tests = [site["test"] for site in sites.values() if _scored(site)]
    if len(tests) > 1:
        name = "mean" if len(tests) == len(sites) else f"mean of {len(tests)}"
        means = (_number(_mean([column.of(test) for test in tests]), column.decimals) for column in columns)
        rows.append([name, "", *means, *[""] * len(traffic)])
    if centralised:
        rows.append(["centralised", *_test_cells(centralised, columns), *[""] * len(traffic)])
    return _aligned(rows)


def _has_traffic(sites: Mapping[str, Mapping]) -> bool:
    return any(site.get("bytes_sent") is not None for site in sites.values())


def _scored(site: Mapping) -> bool:
    return bool(site.get("test")) and site["test"].get("cases", 0) > 0


def _test_cells(test: Mapping | None, columns: Sequence[_Column]) -> list[str]:
    if test is None:
        return [_NONE] * (len(columns) + 1)
    return [str(test["cases"]), *(_number(column.of(test), column.decimals) for column in columns)]


def _score(name: str) -> Callable[[Mapping], float | None]:
    return lambda test: test[name]


def _dice_of(label: str) -> Callable[[Mapping], float | None]:
    return lambda test: test["dice"][label]


def _mean_over_labels(score: str) -> Callable[[Mapping], float | None]:
    return lambda test: _mean(list(test.get(score, {}).values()))


def _mean(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None and not math.isnan(v)]
    return sum(known) / len(known) if known else None


def _number(value: float | None, decimals: int = 4) -> str:
    return _NONE if value is None or math.isnan(value) else f"{value:.{decimals}f}"


def _megabytes(count: int | None) -> str:
    return _NONE if count is None else f"{count / _MEGABYTE:.2f}"


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    """Columns padded to their widest cell: the first to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
    return "\n".join(line.rstrip() for line in lines)
