"""JSON files: whole or not there, and errors that name the file."""

import threading
from pathlib import Path

import pytest

from fedcmt.json_file import JsonFileError, read_json, write_json


def test_what_is_written_is_read_back_and_the_folder_is_made(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "x.json"
    write_json(path, {"name": "Käse", "list": (1, 2), "none": None})
    assert read_json(path) == {"name": "Käse", "list": [1, 2], "none": None}
    write_json(path, {"a": {"b": 1}}, indent=2)
    assert path.read_text() == '{\n  "a": {\n    "b": 1\n  }\n}\n'
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("content", [{"bad": object()}, {"bad": {1, 2}}])
def test_what_is_not_json_leaves_the_old_file(tmp_path: Path, content: dict) -> None:
    path = tmp_path / "x.json"
    write_json(path, {"old": 1})
    with pytest.raises(TypeError, match="not JSON serializable"):
        write_json(path, content)
    assert read_json(path) == {"old": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: int) -> None:
        raise OSError("disk full")

    path = tmp_path / "x.json"
    write_json(path, {"old": 1})
    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        write_json(path, {"new": 1})
    assert read_json(path) == {"old": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_several_threads_may_write_one_file(tmp_path: Path) -> None:
    path, errors = tmp_path / "x.json", []

    def write(value: int) -> None:
        try:
            for _ in range(20):
                write_json(path, {"value": [value] * 1000})
                assert len(set(read_json(path)["value"])) == 1
        except (OSError, ValueError, AssertionError) as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "file not found"),
        (b"{'a': 1}", "not valid JSON"),
        (b"", "not valid JSON"),
        (b"\xff\xfe\x00", "not valid JSON"),
        (b"[1]", "expected a JSON object, found list"),
    ],
)
def test_what_cannot_be_read_names_the_file(tmp_path: Path, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(JsonFileError, match=rf"x\.json: {message}"):
        read_json(tmp_path / "x.json")


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(JsonFileError, match="file not found"):
        read_json(tmp_path)
