"""Random damage to bytes, JSON values and files, for tests of how the project meets it."""

import contextlib
import json
import math
import shutil
import signal
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np

Rng = np.random.Generator

WRONG_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 3.5, 1e308, 10**30, 10**400, math.nan, math.inf, -math.inf),
    *("", " ", "x", "../x", "x" * 5000, "\ud800", "\x00", [], {}, [[]], {"x": 1}, [None], [{}], ["x", "x"], [[1], [2]]),
)
_DEEP = 900
_SECONDS = 30


class StillRunning(BaseException):
    """What `ended_in_time` raises; no `except Exception` of the code under test catches it."""


def chosen(rng: Rng, options: Any) -> Any:
    """One of the options; drawn by index, for numpy would change their type."""
    return list(options)[int(rng.integers(len(options)))]


def spoiled_bytes(content: bytes, rng: Rng) -> tuple[str, bytes]:
    """What was done to the bytes, and what is left of them."""
    damaged = bytearray(content)
    start, length = int(rng.integers(len(content))), int(rng.integers(1, 64))
    kind = chosen(rng, ("cut", "flipped", "zeroed", "random", "inserted", "removed", "empty", "foreign"))
    if kind == "cut":
        del damaged[start:]
    elif kind == "flipped":
        for position in rng.integers(8 * len(content), size=int(rng.integers(1, 5))):
            damaged[position // 8] ^= 1 << (position % 8)
    elif kind == "zeroed":
        damaged[start : start + length] = bytes(len(damaged[start : start + length]))
    elif kind == "random":
        damaged[start : start + length] = rng.bytes(len(damaged[start : start + length]))
    elif kind == "inserted":
        damaged[start:start] = rng.bytes(length)
    elif kind == "removed":
        del damaged[start : start + length]
    elif kind == "empty":
        damaged.clear()
    else:
        damaged[:] = rng.bytes(len(content))
    return f"{kind} at {start}", bytes(damaged)


def spoiled_value(content: Any, rng: Rng) -> tuple[str, Any]:
    """What was done to a JSON value, and what it is now: one place in it is removed, replaced or added to."""
    damaged = deepcopy(content)
    nodes = [node for node in _containers(damaged) if node]
    if not nodes or rng.random() < 0.05:
        wrong = chosen(rng, WRONG_VALUES)
        return f"all is {_short(wrong)}", wrong
    node = chosen(rng, nodes)
    key = chosen(rng, list(node) if isinstance(node, dict) else range(len(node)))
    kind = chosen(rng, ("removed", "replaced", "replaced", "replaced", "wrapped", "doubled", "nested"))
    if kind == "removed":
        del node[key]
    elif kind == "replaced":
        node[key] = wrong = chosen(rng, WRONG_VALUES)
        kind += f" by {_short(wrong)}"
    elif kind == "wrapped":
        node[key] = [node[key]]
    elif kind == "doubled":
        if isinstance(node, dict):
            node[f"{key}2"] = deepcopy(node[key])
        else:
            node.append(deepcopy(node[key]))
    else:
        nested: list[Any] = []
        for _ in range(_DEEP):
            nested = [nested]
        node[key] = nested
    return f"{key!r} {kind}", damaged


def spoil_json(path: Path, rng: Rng) -> str:
    """Damage a JSON file: its values, its encoding, its bytes or the file itself; says what was done."""
    how = rng.random()
    if how < 0.1:
        return spoil_entry(path, rng)
    content = path.read_bytes()
    if how < 0.3:
        what, damaged = spoiled_bytes(content, rng)
    elif how < 0.4:
        encoding = chosen(rng, ("utf-16", "utf-32", "utf-8-sig", "latin-1"))
        what, damaged = encoding, content.replace(b'": ', b'\xc3\xa4": ', 1).decode().encode(encoding)
    else:
        what, value = spoiled_value(json.loads(content), rng)
        damaged = json.dumps(value).encode()
    path.write_bytes(damaged)
    return f"{path.name}: {what}"


def spoil_entry(path: Path, rng: Rng) -> str:
    """Put something that is no file in a file's place, or nothing."""
    kind = chosen(rng, ("gone", "a folder", "a link to itself", "a link to nothing"))
    path.unlink()
    if kind == "a folder":
        path.mkdir()
    elif kind == "a link to itself":
        path.symlink_to(path)
    elif kind == "a link to nothing":
        path.symlink_to(path.with_name("nowhere"))
    return f"{path.name}: {kind}"


def contents(folder: Path) -> dict[str, bytes]:
    """Path below the folder to content, of every file."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@contextlib.contextmanager
def restored(path: Path) -> Iterator[None]:
    """Whatever is done to a file in here is undone, and whatever lies in its folder must stay as it is.

    Raises:
      AssertionError: If another file has changed, come or gone.
    """
    content = path.read_bytes()
    before = contents(path.parent)
    try:
        yield
    finally:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
        path.write_bytes(content)
    changed = sorted(name for name, value in contents(path.parent).items() if before.get(name) != value)
    assert not changed, f"changed {changed}"
    assert set(contents(path.parent)) == set(before), "a file has come or gone"


@contextlib.contextmanager
def ended_in_time() -> Iterator[None]:
    """Whatever still runs after half a minute hangs, and `StillRunning` ends it."""

    def stop(signal_number: int, frame: FrameType | None) -> None:
        raise StillRunning(f"still running after {_SECONDS} s")

    former = signal.signal(signal.SIGALRM, stop)
    signal.alarm(_SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, former)


def _containers(value: Any) -> list[Any]:
    found = [value] if isinstance(value, dict | list) else []
    for child in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        found += _containers(child)
    return found


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 40 else f"{text[:40]}... of {len(text)} characters"
