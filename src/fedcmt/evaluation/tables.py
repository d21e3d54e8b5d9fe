"""Results of a job as plain-text tables."""

import math
from collections.abc import Mapping, Sequence

_MEGABYTE = 1_000_000
_NONE = "-"


def results_table(results: Mapping) -> str:
    """The results of a job as aligned text: one table per set of labels, then one for classification sites.

    Args:
      results: What ``results.json`` holds. Read are ``job``, ``engine``, ``seed``, ``rounds``, ``seconds`` (the line
        above the tables, each optional), ``sites`` (name -> ``task``, ``bytes_sent``, ``bytes_received``, ``test``) and
        ``centralised`` (optional, a ``test`` alone). ``test`` is ``{cases, mean_dice, dice: {label: value}}`` of
        a segmentation site, ``{cases, accuracy, balanced_accuracy, auc}`` of a classification site, or None.

    Returns:
      Scores with four decimals, traffic in MB (10^6 bytes); ``-`` where there is none. A ``mean`` row is the mean over
      the sites of its table that have scores. Sites without scores stand in the first table of their task.
    """
    sites, centralised = results["sites"], results.get("centralised")
    segmentation = {name: site for name, site in sites.items() if site.get("task") != "classification"}
    classification = {name: site for name, site in sites.items() if site.get("task") == "classification"}
    pooled_is_classifier = centralised is not None and "accuracy" in centralised
    blocks = [_headline(results)] if _headline(results) else []
    blocks += _segmentation_tables(segmentation, None if pooled_is_classifier else centralised)
    if classification:
        blocks.append(_classification_table(classification, centralised if pooled_is_classifier else None))
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


def _headline(results: Mapping) -> str:
    parts = [f"{key} {results[key]}" for key in ("job", "engine", "seed", "rounds") if results.get(key) is not None]
    if results.get("seconds") is not None:
        parts.append(f"{results['seconds']:.1f} s")
    return ", ".join(parts)


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
        paths = [*(("dice", label) for label in labels), ("mean_dice",)]
        tables.append(_table([*labels, "mean Dice"], paths, rows, centralised if labels == pooled else None))
    return tables


def _classification_table(sites: Mapping[str, Mapping], centralised: Mapping | None) -> str:
    paths = [("accuracy",), ("balanced_accuracy",), ("auc",)]
    return _table(["accuracy", "balanced accuracy", "AUC"], paths, sites, centralised)


def _table(
    headers: list[str], paths: Sequence[tuple[str, ...]], sites: Mapping[str, Mapping], centralised: Mapping | None
) -> str:
    """One table: a row per site, their mean if at least two have scores, and the model of the pooled data."""
    with_traffic = any(site.get("bytes_sent") is not None for site in sites.values())
    traffic = ["MB sent", "MB received"] if with_traffic else []
    rows = [["site", "cases", *headers, *traffic]]
    for name, site in sites.items():
        cells = [name, *_test_cells(site.get("test") if _scored(site) else None, paths)]
        rows.append(cells + [_megabytes(site.get(key)) for key in ("bytes_sent", "bytes_received")][: len(traffic)])
    tests = [site["test"] for site in sites.values() if _scored(site)]
    if len(tests) > 1:
        name = "mean" if len(tests) == len(sites) else f"mean of {len(tests)}"
        rows.append(
            [name, "", *(_mean([_value(test, path) for test in tests]) for path in paths), *[""] * len(traffic)]
        )
    if centralised:
        rows.append(["centralised", *_test_cells(centralised, paths), *[""] * len(traffic)])
    return _aligned(rows)


def _scored(site: Mapping) -> bool:
    return bool(site.get("test")) and site["test"].get("cases", 0) > 0


def _test_cells(test: Mapping | None, paths: Sequence[tuple[str, ...]]) -> list[str]:
    if test is None:
        return [_NONE] * (len(paths) + 1)
    return [str(test["cases"]), *(_number(_value(test, path)) for path in paths)]


def _value(test: Mapping, path: tuple[str, ...]) -> float | None:
    value = test
    for key in path:
        value = value[key]
    return value  # type: ignore[return-value]  # a leaf by the shape `results_table` documents


def _mean(values: Sequence[float | None]) -> str:
    known = [v for v in values if v is not None and not math.isnan(v)]
    return _number(sum(known) / len(known)) if known else _NONE


def _number(value: float | None) -> str:
    return _NONE if value is None or math.isnan(value) else f"{value:.4f}"


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
