"""JSON files: whole or not there, and errors that name the file."""

import threading
from pathlib import Path

import pytest

from fedcmt.json_file import JsonFileError, read_json, read_state, write_json, write_state


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
        (b'{"a": {"b": 1, "c": 2, "b": 3}}', r"not valid JSON \(the key 'b' stands there twice\)"),
    ],
)
def test_what_cannot_be_read_names_the_file(tmp_path: Path, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(JsonFileError, match=rf"x\.json: {message}"):
        read_json(tmp_path / "x.json")


def test_a_mark_that_some_editors_put_first_is_no_part_of_it(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_json(tmp_path / "x.json") == {"a": 1}


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(JsonFileError, match="file not found"):
        read_json(tmp_path)


@pytest.mark.parametrize(("depth", "said"), [(65, "deeper than 64 levels"), (10**5, "deeper than 64 levels")])
def test_what_is_nested_too_deeply_is_refused(tmp_path: Path, depth: int, said: str) -> None:
    path = tmp_path / "x.json"
    path.write_text('{"a":' + "[" * depth + "]" * depth + "}")
    with pytest.raises(JsonFileError, match=rf"x\.json: .*{said}"):
        read_json(path)


def test_64_levels_are_read(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text('{"a":' + "[" * 63 + "]" * 63 + "}")
    assert list(read_json(path)) == ["a"]


def test_a_state_comes_back_in_its_order(tmp_path: Path) -> None:
    content = {"z": {"ü": 0.1, "b": [1, None, float("inf")]}, "a": 10**30}
    write_state(tmp_path / "x.json", content)
    assert list(read_state(tmp_path / "x.json").items()) == list(content.items())


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('"seed": 5', '"seed": 7', "damaged, its checksum is not that of its content"),
        ('"seed": 5, "job": "j"', '"job": "j", "seed": 5', "damaged, its checksum"),
        ('"sha256"', '"sha257"', "has no checksum: of another program or version"),
    ],
)
def test_a_state_that_was_changed_is_refused(tmp_path: Path, old: str, new: str, said: str) -> None:
    path = tmp_path / "x.json"
    write_state(path, {"seed": 5, "job": "j"})
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(JsonFileError, match=rf"x\.json: {said}.* start the run anew"):
        read_state(path)


def test_a_state_of_another_version_is_refused_by_what_it_lacks(tmp_path: Path) -> None:
    write_state(tmp_path / "x.json", {"seed": 5})
    with pytest.raises(JsonFileError, match=r"x\.json: has no \['plans'\]: of another version"):
        read_state(tmp_path / "x.json", needs=["seed", "plans"])
