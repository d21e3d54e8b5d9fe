"""The ledger: nothing personal leaves, and everything that leaves is written down."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fedcmt.privacy.egress import EgressLedger, PersonalTensorError
from fedcmt.wire import encode


def release(ledger: EgressLedger, tensors: dict[str, Tensor], round_idx: int | None = 0, **meta: object) -> None:
    ledger.release(tensors, meta, allowed=["a", "b@mr.t1"], task="train", round_idx=round_idx)


def test_a_personal_tensor_is_refused_and_nothing_is_recorded(tmp_path: Path) -> None:
    ledger = EgressLedger(tmp_path / "egress.jsonl")
    with pytest.raises(PersonalTensorError, match=r"task 'train': refused to send 1 .*decoder\.bias"):
        release(ledger, {"a": torch.ones(2), "decoder.bias": torch.ones(3)})
    assert not ledger.path.exists()
    assert ledger.rows() == []


def test_a_refused_message_leaves_the_earlier_rows(tmp_path: Path) -> None:
    ledger = EgressLedger(tmp_path / "egress.jsonl")
    release(ledger, {"a": torch.ones(2)})
    before = ledger.path.read_bytes()
    with pytest.raises(PersonalTensorError):
        release(ledger, {"decoder.bias": torch.ones(3)})
    assert ledger.path.read_bytes() == before


def test_a_row_says_what_left(tmp_path: Path) -> None:
    ledger = EgressLedger(tmp_path / "site" / "egress.jsonl")
    release(ledger, {"a": torch.tensor([[3.0, 0.0, 0.0]]), "b@mr.t1": torch.tensor([4.0]).half()}, 6, loss=0.5, cases=3)
    (row,) = ledger.rows()
    assert (row["task"], row["round"], row["meta_keys"]) == ("train", 6, ["cases", "loss"])
    assert row["norm"] == 5.0
    assert row["tensor_bytes"] == 3 * 4 + 1 * 2
    assert row["tensors"] == {
        "a": {"shape": [1, 3], "dtype": "float32"},
        "b@mr.t1": {"shape": [1], "dtype": "float16"},
    }


def test_contents_of_meta_are_not_recorded_but_counted(tmp_path: Path) -> None:
    ledger = EgressLedger(tmp_path / "egress.jsonl")
    release(ledger, {}, None, fingerprint="x" * 100)
    (row,) = ledger.rows()
    assert "xxx" not in ledger.path.read_text()
    assert row["bytes"] == len(json.dumps({"fingerprint": "x" * 100}))
    assert (row["tensor_bytes"], row["norm"], row["round"]) == (0, 0.0, None)


def test_bytes_are_close_to_four_per_number_for_a_realistic_update(tmp_path: Path) -> None:
    names = [f"encoder.stages.{i // 10}.0.convs.{i % 10}.conv.weight" for i in range(60)]
    tensors = {name: torch.ones(13, 15, 3, 3, 3) for name in names}  # 5265 numbers each
    ledger = EgressLedger(tmp_path / "egress.jsonl")
    meta = {"round": 1, "num_steps": 250, "metrics": {"loss": 0.123456789, "val_dice_received": 0.5}}
    ledger.release(tensors, meta, allowed=names, task="train", round_idx=1)
    numbers = 60 * 13 * 15 * 27
    assert 1.0 < ledger.rows()[0]["bytes"] / (4 * numbers) < 1.02


def test_a_restarted_site_appends(tmp_path: Path) -> None:
    for round_idx in range(3):
        release(EgressLedger(tmp_path / "egress.jsonl"), {"a": torch.ones(2)}, round_idx)
    assert [row["round"] for row in EgressLedger(tmp_path / "egress.jsonl").rows()] == [0, 1, 2]


def test_a_line_that_a_kill_has_cut_off_does_not_spoil_the_next(tmp_path: Path) -> None:
    path = tmp_path / "egress.jsonl"
    path.write_text('{"task": "train"}\n{"task": "tra')
    ledger = EgressLedger(path)
    for round_idx in (1, 2):
        ledger.release({}, {}, allowed=(), task="train", round_idx=round_idx)
    first, torn, *rest = path.read_text().splitlines()
    assert (json.loads(first), torn) == ({"task": "train"}, '{"task": "tra')
    assert [json.loads(line)["round"] for line in rest] == [1, 2]


def test_an_extra_is_recorded_under_a_name_of_its_own(tmp_path: Path) -> None:
    ledger = EgressLedger(tmp_path / "egress.jsonl")
    ledger.release(
        {"w": torch.ones(2)}, {}, allowed=["w"], task="train", round_idx=0, extras={"w": torch.ones(3)}, personal=["d"]
    )
    (row,) = ledger.rows()
    assert {name: t["shape"] for name, t in row["tensors"].items()} == {"w": [2], "extra:w": [3]}
    assert row["tensor_bytes"] == 20


def test_an_extra_that_names_a_personal_parameter_is_refused(tmp_path: Path) -> None:
    ledger = EgressLedger(tmp_path / "egress.jsonl")
    with pytest.raises(PersonalTensorError, match=r"decoder\.w"):
        ledger.release(
            {}, {}, allowed=[], task="train", round_idx=0, extras={"decoder.w": torch.ones(1)}, personal=["decoder.w"]
        )
    assert ledger.rows() == []


def test_an_update_in_bytes_is_recorded_as_it_travels_and_with_the_norm_of_its_values(tmp_path: Path) -> None:
    ledger = EgressLedger(tmp_path / "egress.jsonl")
    release(ledger, encode({"a": torch.tensor([[3.0, 0.0, 0.0], [0.0, 4.0, 0.0]])}, "int8", seed=0))
    (row,) = ledger.rows()
    assert row["tensors"] == {
        "a": {"shape": [2, 3], "dtype": "int8"},
        "a#scale": {"shape": [2], "dtype": "float32"},
    }
    assert row["tensor_bytes"] == 6 + 2 * 4
    assert row["norm"] == pytest.approx(5.0, rel=1e-6)


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_a_personal_tensor_is_refused_in_any_type(dtype: str, tmp_path: Path) -> None:
    ledger = EgressLedger(tmp_path / "egress.jsonl")
    with pytest.raises(PersonalTensorError, match=r"refused to send 1 .*\['decoder\.bias'\]"):
        release(ledger, encode({"a": torch.ones(2), "decoder.bias": torch.ones(3)}, dtype, seed=0))
    assert ledger.rows() == []


def test_scales_without_their_tensor_are_refused(tmp_path: Path) -> None:
    ledger = EgressLedger(tmp_path / "egress.jsonl")
    for stray in ("a#scale", "decoder.bias#scale"):
        with pytest.raises(PersonalTensorError, match=stray):
            release(ledger, {stray: torch.ones(3)})
    assert ledger.rows() == []
