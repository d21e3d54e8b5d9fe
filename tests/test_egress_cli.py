"""The report of what left a site: every message of the ledger is counted, and a torn line hides no other."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fedcmt import egress
from fedcmt.egress import EgressLogError, SentTensor, by_group, by_task, distinct_tensors, main, read_log
from fedcmt.privacy.egress import EgressLedger

FIRST = "encoder.stages.0.0.convs.0.conv.weight@mr.t1"
BIAS = "encoder.stages.0.0.convs.0.conv.bias@mr"
DEEP = "encoder.stages.1.0.convs.0.conv.weight"


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """A site that told its fingerprint and trained rounds 0 and 1, the second of them twice."""
    ledger = EgressLedger(tmp_path / "egress.jsonl")
    ledger.release({}, {"fingerprint": {}}, allowed=[], task="fingerprint", round_idx=None)
    tensors = {FIRST: torch.zeros(2, 3), BIAS: torch.zeros(2), DEEP: torch.full((4, 2), 3.0)}
    for round_idx, factor in ((0, 1.0), (1, 0.5), (1, 2.0)):
        sent = {name: factor * tensor for name, tensor in tensors.items()}
        ledger.release(
            sent,
            {"round": round_idx, "num_steps": 2},
            allowed=sent,
            task="train",
            round_idx=round_idx,
            extras={"anchor": torch.zeros(())},
        )
    return ledger.path


def test_each_task_of_each_round_is_a_row_with_the_sum_of_its_messages(log: Path) -> None:
    messages, broken = read_log(log)
    rows = by_task(messages)
    assert broken == []
    assert [(row.task, row.round_idx, row.messages) for row in rows] == [
        ("fingerprint", None, 1),
        ("train", 0, 1),
        ("train", 1, 2),
    ]
    assert rows[1].tensors == 4
    assert rows[1].norm == pytest.approx(math.sqrt(8 * 9))
    assert rows[2].norm == pytest.approx(2 * math.sqrt(8 * 9))  # the larger of the two
    assert rows[2].size_bytes == 2 * rows[1].size_bytes
    assert rows[1].meta_keys == ("num_steps", "round")
    written = sum(json.loads(line)["bytes"] for line in log.read_text().splitlines())
    assert sum(row.size_bytes for row in rows) == written


def test_names_that_begin_alike_and_are_the_same_copy_are_one_group(log: Path) -> None:
    tensors = distinct_tensors(read_log(log)[0])
    assert {row.group: (row.tensors, row.numbers) for row in by_group(tensors)} == {
        "encoder.stages.0.* @mr.t1": (1, 6),
        "encoder.stages.0.* @mr": (1, 2),
        "encoder.stages.1.*": (1, 8),
        "extra:anchor": (1, 1),
    }


def test_a_name_of_two_parts_is_grouped_by_its_first() -> None:
    assert SentTensor("head.weight", (2,), "float32").group == "head.*"


def test_a_tensor_of_another_shape_in_another_round_is_listed_twice(tmp_path: Path) -> None:
    ledger = EgressLedger(tmp_path / "egress.jsonl")
    for rows in (2, 3):
        ledger.release({DEEP: torch.zeros(rows, 2)}, {}, allowed=[DEEP], task="train", round_idx=rows)
    tensors = distinct_tensors(read_log(ledger.path)[0])
    assert [tensor.shape for tensor in tensors] == [(2, 2), (3, 2)]
    assert by_group(tensors)[0].tensors == 1


def test_a_torn_last_line_is_named_and_the_rest_is_shown(log: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = log.read_text()
    log.write_text(whole[:-40])
    assert main([str(log)]) == 0
    out = capsys.readouterr().out
    assert "Not shown: line 4, which cannot be read" in out
    assert [(row.round_idx, row.messages) for row in by_task(read_log(log)[0])] == [(None, 1), (0, 1), (1, 1)]


def test_a_line_in_the_middle_that_is_another_object_is_named(log: Path) -> None:
    lines = log.read_text().splitlines()
    lines[1] = '{"task": "train"}'
    log.write_text("\n".join(lines))
    messages, broken = read_log(log)
    assert (len(messages), broken) == (3, [2])


@pytest.mark.parametrize(
    "change",
    [
        {"meta_keys": [1, 2]},
        {"task": "\x1b[31mevil"},
        {"tensors": {"w": {"shape": ["a"], "dtype": "float32"}}},
        {"tensors": {"w": {"shape": [2], "dtype": 7}}},
        {"bytes": True},
    ],
)
def test_a_row_of_other_types_or_of_control_codes_is_named_and_the_rest_is_shown(
    change: dict, log: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = log.read_text().splitlines()
    log.write_text("\n".join([*lines, json.dumps({**json.loads(lines[0]), **change})]))
    assert main([str(log), "--tensors"]) == 0
    out = capsys.readouterr().out
    assert f"Not shown: line {len(lines) + 1}," in out
    assert "\x1b" not in out


def test_a_reader_that_has_seen_enough_ends_it_without_a_word(log: Path) -> None:
    log.write_text(log.read_text() + "torn\n" * 20_000)  # each is named: more than a pipe holds
    command = f"{sys.executable} -m fedcmt.egress {log} --json | head -1"
    environment = {**os.environ, "PYTHONPATH": str(Path(egress.__file__).parents[1])}
    done = subprocess.run(["bash", "-c", command], env=environment, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("{\n", "")


def test_a_message_whose_norm_is_not_a_number_is_shown(log: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = log.read_text().splitlines()
    lines[0] = json.dumps({**json.loads(lines[0]), "norm": math.nan})
    log.write_text("\n".join(lines))
    assert main([str(log)]) == 0
    assert "nan" in capsys.readouterr().out


@pytest.mark.parametrize("content", ["# Notes\nno ledger\n", '{"task": 3}\n', "[]\n"])
def test_another_file_is_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str) -> None:
    path = tmp_path / "notes.md"
    path.write_text(content)
    assert main([str(path)]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"fedcmt.egress: {path}: none of ")
    assert error.count("\n") == 1


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EgressLogError, match="no such file; a site's ledger is WORKSPACE/sites/SITE"):
        read_log(tmp_path / "egress.jsonl")


def test_an_empty_ledger_says_that_nothing_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "egress.jsonl").touch()
    assert main([str(tmp_path / "egress.jsonl")]) == 0
    assert capsys.readouterr().out == "No message.\n"


def test_one_round_can_be_shown_alone(log: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(log), "--round", "1", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert [(row["task"], row["round_idx"]) for row in shown["tasks"]] == [("train", 1)]
    assert shown["messages"] == 2


def test_every_tensor_is_listed_with_shape_and_type_on_request(log: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(log), "--tensors"]) == 0
    out = capsys.readouterr().out
    assert f"  {FIRST}  2x3 float32\n" in out
    assert "  extra:anchor  one number float32\n" in out
    assert main([str(log), "--tensors", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)["tensors"]
    assert listed[0] == {"name": BIAS, "shape": [2], "dtype": "float32"}


def test_the_text_s_total_is_the_json_s(log: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([str(log), "--json"])
    total = json.loads(capsys.readouterr().out)["size_bytes"]
    main([str(log)])
    assert f"{total:,}" in capsys.readouterr().out


def test_help_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        egress.main(["--help"])
    assert "python -m fedcmt.egress workspace/brats_sdl/sites/client1/egress.jsonl" in capsys.readouterr().out
