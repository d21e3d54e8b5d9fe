"""Checks of settings that come from a job's JSON."""

import sys
from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any, TypeGuard, TypeVar

T = TypeVar("T")


def require(ok: bool, where: str, key: str, value: object, expected: str, error: type[ValueError] = ValueError) -> None:
    """Raise unless ``ok``, saying where, which key, what came and what was expected."""
    if not ok:
        raise error(f"{where}: {key} is {value!r}, expected {expected}")


def is_int(value: object) -> TypeGuard[int]:
    """A whole number; JSON's true and false are none."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> TypeGuard[float]:
    """A finite number; JSON's true and false are none."""
    largest = sys.float_info.max  # JSON's whole numbers have no limit
    return isinstance(value, int | float) and not isinstance(value, bool) and -largest <= value <= largest


def needed_keys(cls: type) -> list[str]:
    """Names of a dataclass's fields that have no default, in its order."""
    return [f.name for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING]


def read_settings(cls: type[T], values: Mapping[str, Any], where: str) -> T:
    """A dataclass from a job's object.

    Raises:
      TypeError: If there is no object, or a key is unknown or missing.
      ValueError: If the class refuses a value.
    """
    known = sorted(f.name for f in fields(cls))  # type: ignore[arg-type]
    if not isinstance(values, Mapping):
        raise TypeError(f"{where} is {values!r}, expected an object with keys of {known}")
    if unknown := sorted(set(values) - set(known)):
        raise TypeError(f"{where}: unknown keys {unknown}; known keys: {known}")
    needed = sorted(needed_keys(cls))
    if missing := [key for key in needed if key not in values]:
        raise TypeError(f"{where}: keys {missing} are missing, with {sorted(values)} alone; it needs {needed}")
    return cls(**values)
