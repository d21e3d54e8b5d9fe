"""JSON objects in files: written whole or not at all, and read with errors that name the file."""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

_DEEPEST = 64
"""Objects and lists in each other; whatever goes through a deeper one may run out of stack."""
_CHECKSUM_KEY = "sha256"


class JsonFileError(ValueError):
    """A file that does not hold the JSON object it should; the message names it."""


def write_json(path: Path, content: Mapping[str, Any], *, indent: int | None = None) -> None:
    """Write an object so that readers, also after a crash, find the old file or the new one, never half of one.

    Args:
      path: The file; its folder is made if needed.
      content: What `json` can write. With anything else `json`'s error leaves the old file as it was.
      indent: Blanks per level; None for one line.
    """
    text = json.dumps(content, indent=indent) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    # A name of its own: sites in one process or several may write the same file at once.
    temporary = path.with_name(f".{path.name}.{uuid4().hex}.partial")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())  # else a crash of the machine may keep the new name and lose what it names
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file.

    Raises:
      JsonFileError: If there is no such file, or it is not JSON, not an object, has a key twice, or is nested deeper
        than 64 levels.
    """
    if not path.is_file():
        raise JsonFileError(f"{path}: file not found")
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=_unrepeated)
    except ValueError as error:  # JSON's, UTF-8's or a repeated key's
        raise JsonFileError(f"{path}: not valid JSON ({error})") from error
    except RecursionError as error:
        raise _too_deep(path) from error
    if not isinstance(content, dict):
        raise JsonFileError(f"{path}: expected a JSON object, found {type(content).__name__}")
    if _is_too_deep(content):
        raise _too_deep(path)
    return content


def _unrepeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of these pairs; `json` alone would keep the last of two and say nothing."""
    content = dict(pairs)
    if len(content) != len(pairs):
        repeated = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {repeated!r} stands there twice")
    return content


def write_state(path: Path, content: Mapping[str, Any]) -> None:
    """Write an object that only `read_state` is to read, with the SHA-256 of what it holds."""
    write_json(path, {**content, _CHECKSUM_KEY: _checksum(content)})


def read_state(path: Path, *, needs: Collection[str] = ()) -> dict[str, Any]:
    """What `write_state` wrote, to the bit.

    Args:
      path: The file.
      needs: Keys that the object must have.

    Raises:
      JsonFileError: As in `read_json`, or if the file has been changed, is of another program or version, or lacks a
        key.
    """
    content = read_json(path)
    if _CHECKSUM_KEY not in content:
        raise JsonFileError(f"{path}: has no checksum: of another program or version, or damaged. {_ADVICE}")
    if content.pop(_CHECKSUM_KEY) != _checksum(content):
        raise JsonFileError(f"{path}: damaged, its checksum is not that of its content. {_ADVICE}")
    if missing := sorted(set(needs) - set(content)):
        raise JsonFileError(f"{path}: has no {missing}: of another version. {_ADVICE}")
    return content


_ADVICE = "Restore it from a copy, or start the run anew."


def _checksum(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _is_too_deep(content: dict[str, Any]) -> bool:
    level: list[Any] = [content]
    for _ in range(_DEEPEST):
        objects = [value.values() for value in level if isinstance(value, dict)]
        lists = [value for value in level if isinstance(value, list)]
        level = [child for children in (*objects, *lists) for child in children]
    return any(isinstance(value, dict | list) for value in level)


def _too_deep(path: Path) -> JsonFileError:
    return JsonFileError(f"{path}: objects and lists are nested deeper than {_DEEPEST} levels. Restore the file.")
