"""Checked reading of the plain JSON a fingerprint travels as, which may come from anybody.

Every function returns what it read in its final type, or raises `ValueError` that names the field and what it holds.
"""

from collections.abc import Mapping, Sequence
from typing import Any

AxisTable = tuple[tuple[int, int, int], ...]
"""Sorted rows (spacing bin, shape bin, number of cases) of one array axis."""

Counts = tuple[tuple[int, int], ...]
"""Sorted rows (bin, count)."""

Labels = tuple[tuple[str, int | tuple[int, ...]], ...]
"""Label name and value (a tuple: a region), in dataset.json's order, which for regions is the order of outputs."""


def labels(content: Any) -> Labels:
    """Rows (name, value or values)."""
    found: list[tuple[str, int | tuple[int, ...]]] = []
    for pair in items(content, "labels"):
        name, value = row(pair, 2, "labels")
        region = isinstance(value, list | tuple)
        found.append((string(name, "labels"), integers(value, "labels") if region else integer(value, "labels", 0)))
    names = [name for name, _ in found]
    if len(set(names)) != len(names) or not names:
        raise ValueError(f"fingerprint: labels {names} must be different names, and at least one")
    return tuple(found)


def axis_table(content: Any, where: str, num_cases: int) -> AxisTable:
    """Rows (spacing bin, shape bin, number of cases) of ``num_cases`` in all, sorted."""
    rows = []
    for item in items(content, where):
        spacing, shape, count = row(item, 3, where)
        rows.append((integer(spacing, where, 1), integer(shape, where, 0), integer(count, where, 1)))
    check_total(sum(n for _, _, n in rows), num_cases, where, "cases")
    check_distinct([(spacing, shape) for spacing, shape, _ in rows], where)
    return tuple(sorted(rows))


def crop_counts(content: Any, num_cases: int, *, last_bin: int) -> Counts:
    """Rows (bin, number of cases) of ``num_cases`` in all, sorted."""
    rows = [row(item, 2, "crop") for item in items(content, "crop")]
    counts = [(integer(b, "crop", 0), integer(n, "crop", 1)) for b, n in rows]
    beyond = [b for b, _ in counts if b > last_bin]
    if beyond:
        raise ValueError(f"fingerprint: crop holds bins {beyond}, expected at most {last_bin}")
    check_total(sum(n for _, n in counts), num_cases, "crop", "cases")
    check_distinct([b for b, _ in counts], "crop")
    return tuple(sorted(counts))


def integer(value: Any, where: str, minimum: int | None = None) -> int:
    """A whole number, not below ``minimum``."""
    if isinstance(value, bool) or not isinstance(value, int) or (minimum is not None and value < minimum):
        bound = "" if minimum is None else f" of at least {minimum}"
        raise ValueError(f"fingerprint: {where} holds {value!r}, expected an integer{bound}")
    return value


def integers(value: Any, where: str) -> tuple[int, ...]:
    """A list of whole numbers."""
    return tuple(integer(v, where) for v in items(value, where))


def number(value: Any, where: str) -> float:
    """A finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not -1e300 < value < 1e300:
        raise ValueError(f"fingerprint: {where} holds {value!r}, expected a finite number")
    return float(value)


def string(value: Any, where: str) -> str:
    """A text that is not empty."""
    if not isinstance(value, str) or not value:
        raise ValueError(f"fingerprint: {where} holds {value!r}, expected a name")
    return value


def items(value: Any, where: str) -> Sequence[Any]:
    """A list."""
    if not isinstance(value, list | tuple):
        raise ValueError(f"fingerprint: {where} holds {value!r}, expected a list")
    return value


def row(value: Any, length: int, where: str) -> Sequence[Any]:
    """A list of ``length`` values."""
    values = items(value, where)
    if len(values) != length:
        raise ValueError(
            f"fingerprint: {where} holds a row of {len(values)} values, expected {length}: {list(values)!r}"
        )
    return values


def check_keys(content: Any, expected: frozenset[str], where: str) -> None:
    """Raise unless this is an object with exactly these keys."""
    if not isinstance(content, Mapping):
        raise ValueError(f"{where}: expected an object with {sorted(expected)}, got {type(content).__name__}")
    missing, unknown = sorted(expected - set(content)), sorted(set(content) - expected)
    if missing or unknown:
        raise ValueError(
            f"{where}: missing keys {missing}, unknown keys {unknown}; do both sides run the same version of fedcmt?"
        )


def check_total(total: int, expected: int, where: str, what: str) -> None:
    """Raise unless the counts of a table add up."""
    if total != expected:
        raise ValueError(f"fingerprint: {where} counts {total} {what}, expected {expected}")


def check_distinct(bins: Sequence[object], where: str) -> None:
    """Raise if a bin is there twice."""
    if len(set(bins)) != len(bins):
        raise ValueError(f"fingerprint: {where} holds a bin twice; send each bin once")
