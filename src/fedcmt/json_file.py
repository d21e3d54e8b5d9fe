"""JSON objects in files: written whole or not at all, and read with errors that name the file."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4


class JsonFileError(ValueError):
    """A file that holds no JSON object; the message names it."""


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
      JsonFileError: If there is no such file, or it is not JSON or not an object.
    """
    if not path.is_file():
        raise JsonFileError(f"{path}: file not found")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # JSON's, or UTF-8's
        raise JsonFileError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise JsonFileError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content
