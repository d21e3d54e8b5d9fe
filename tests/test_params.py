"""Named tensors: one name each, copied in place, checked before anything is written, stored atomically."""

import logging
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save, save_file
from torch import nn

from fedcmt.params import (
    ParameterError,
    check_finite,
    check_names,
    check_shapes,
    copy_into,
    delta,
    is_dense,
    load_newest,
    load_tensors,
    named_tensors,
    norm,
    put_rows,
    save_tensors,
    serialized_size,
    snapshot,
    take_rows,
)

DTYPES = (
    torch.float64, torch.float32, torch.float16, torch.bfloat16,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
)  # fmt: skip


def test_copying_keeps_the_parameter_and_the_optimiser_s_momentum() -> None:
    layer = nn.Linear(2, 1, bias=False)
    parameter = layer.weight
    optimizer = torch.optim.SGD([parameter], lr=0.5, momentum=0.5)
    parameter.grad = torch.tensor([[1.0, 2.0]])
    optimizer.step()
    copy_into(layer, {"weight": torch.tensor([[10.0, 20.0]])})
    parameter.grad = torch.zeros(1, 2)
    optimizer.step()
    # velocity 0.5 * (1, 2) + 0; step lr * velocity = 0.5 * (0.5, 1)
    torch.testing.assert_close(layer.weight.data, torch.tensor([[9.75, 19.5]]))
    assert layer.weight is parameter


def test_copying_some_names_leaves_the_others() -> None:
    layer = nn.Linear(3, 2)
    bias = layer.bias.detach().clone()
    copy_into(layer, {"weight": torch.full((2, 3), 7.0)})
    assert torch.equal(layer.weight, torch.full((2, 3), 7.0))
    assert torch.equal(layer.bias, bias)


def test_copying_converts_to_the_parameter_s_dtype() -> None:
    layer = nn.Linear(3, 2)
    copy_into(layer, {"bias": torch.tensor([0.5, -2.0], dtype=torch.float16)})
    assert layer.bias.dtype == torch.float32
    assert layer.bias.tolist() == [0.5, -2.0]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"head": torch.zeros(2)}, r"here: .*1 unknown \[head\]"),
        ({"weight": torch.zeros(3, 2)}, r"here: .*weight \(3, 2\) instead of \(2, 3\)"),
        ({"weight": torch.zeros(1)}, r"weight \(1,\) instead of \(2, 3\)"),
    ],
)
def test_unknown_or_reshaped_tensors_are_refused_and_nothing_is_written(wrong: dict, message: str) -> None:
    layer = nn.Linear(3, 2)
    before = snapshot(layer)
    with pytest.raises(ParameterError, match=message):
        copy_into(layer, {"bias": torch.full((2,), 9.0), **wrong}, where="here")
    assert all(torch.equal(before[name], tensor) for name, tensor in named_tensors(layer).items())


def test_missing_and_unknown_names_are_told_apart() -> None:
    with pytest.raises(ParameterError, match=r"payload: 1 parameters missing \[b\], 2 unknown \[c, d\]"):
        check_names(["a", "c", "d"], ["a", "b"], where="payload")


def test_long_lists_of_names_are_cut() -> None:
    with pytest.raises(ParameterError, match=r"6 parameters missing \[n0, n1, n2, n3, … 2 more\]"):
        check_names([], [f"n{i}" for i in range(6)], where="payload")


def test_missing_tensors_are_an_error_of_shapes_too() -> None:
    with pytest.raises(ParameterError, match=r"1 parameters missing \[b\]"):
        check_shapes({"a": torch.zeros(2)}, {"a": (2,), "b": (3,)}, where="x")


def test_each_tensor_of_an_nnunet_has_one_name(unet: Callable[..., nn.Module]) -> None:
    network = unet("plain")
    tensors = named_tensors(network)
    places = {tensor.data_ptr() for tensor in tensors.values()}
    aliased = network.state_dict()
    assert len(places) == len(tensors) < len(aliased)
    assert places == {tensor.data_ptr() for tensor in aliased.values()}
    assert not any(name.startswith("decoder.encoder.") for name in tensors)


@torch.no_grad()
def test_a_copied_encoder_changes_the_output(unet: Callable[..., nn.Module]) -> None:
    network, other = unet("plain", seed=1), unet("plain", seed=2)
    image = torch.randn(1, 2, 4, 8, 12, generator=torch.Generator().manual_seed(0))
    before = network(image)
    parts = {n: t for n, t in snapshot(other).items() if n.startswith("encoder.")}
    copy_into(network, parts)
    assert (network(image) - before).abs().max() > 1e-3
    copy_into(network, {n: t for n, t in snapshot(other).items() if n.startswith("decoder.")})
    assert torch.equal(network(image), other(image))


def test_buffers_are_refused_by_name() -> None:
    with pytest.raises(ParameterError, match=r"Sequential has buffers \[1.running_mean"):
        named_tensors(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)))


def test_a_snapshot_does_not_follow_the_network_and_a_view_does() -> None:
    layer = nn.Linear(3, 2)
    kept, view = snapshot(layer), named_tensors(layer)
    copy_into(layer, {"bias": torch.tensor([3.0, 4.0])})
    assert view["bias"].tolist() == [3.0, 4.0]
    assert kept["bias"].tolist() != [3.0, 4.0]


def test_delta_is_trained_minus_received() -> None:
    change = delta({"a": torch.tensor([5.0, 1.0])}, {"a": torch.tensor([2.0, 3.0])})
    assert change["a"].tolist() == [3.0, -2.0]


def test_delta_of_different_names_is_refused() -> None:
    with pytest.raises(ParameterError, match=r"delta: 1 parameters missing \[b\]"):
        delta({"a": torch.ones(1)}, {"a": torch.ones(1), "b": torch.ones(1)})


def test_norm_runs_over_all_tensors() -> None:
    assert norm({"a": torch.tensor([3.0]), "b": torch.tensor([[0.0, 4.0]])}) == 5.0
    assert norm({}) == 0.0


def test_norm_does_not_overflow_in_float32() -> None:
    # (1e20)^2 = 1e40 is above float32's 3.4e38
    assert norm({"a": torch.tensor([1e20, 1e20])}) == pytest.approx(math.sqrt(2) * 1e20)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_tensors_that_are_not_finite_are_named(bad: float) -> None:
    fine = {"a": torch.tensor([1.0, -1.0])}
    check_finite(fine, where="update")
    with pytest.raises(ParameterError, match=r"update: 1 tensors are not finite: \[b\]"):
        check_finite({**fine, "b": torch.tensor([0.0, bad])}, where="update")


def test_tensors_without_fractions_are_not_an_update() -> None:
    with pytest.raises(ParameterError, match=r"update: 1 tensors are not floating point: \[n torch.int64\]"):
        check_finite({"a": torch.ones(2), "n": torch.tensor([7])}, where="update")


def test_a_delta_is_never_broadcast() -> None:
    with pytest.raises(ParameterError, match=r"w \(3,\) instead of \(1,\)"):
        delta({"w": torch.ones(3)}, {"w": torch.ones(1)})


def test_two_names_for_one_memory_are_stored_twice(tmp_path: Path) -> None:
    tensor = torch.tensor([1.0, 2.0])
    save_tensors(tmp_path / "s.safetensors", {"params/w": tensor, "memory/w": tensor}, {})
    loaded, _ = load_tensors(tmp_path / "s.safetensors")
    assert loaded["params/w"].tolist() == loaded["memory/w"].tolist() == [1.0, 2.0]


MIXED = [
    {"b": torch.ones(100), "a": torch.ones(1)},
    {"a": torch.ones(5, dtype=torch.int8), "b": torch.ones(100, dtype=torch.float64)},
    {f"{d}": torch.ones(3).to(d) for d in DTYPES} | {"é": torch.ones(7, dtype=torch.int16)},
]


@pytest.mark.parametrize("tensors", MIXED)
def test_serialized_size_follows_the_files_own_order(tensors: dict[str, torch.Tensor]) -> None:
    assert serialized_size(tensors)[1] == len(save(tensors))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_serialized_size_is_that_of_the_safetensors_file(dtype: torch.dtype) -> None:
    one = torch.tensor(1)
    tensors = {"a": one.expand(3, 5).to(dtype), "b.weight": one.expand(2, 1, 7).to(dtype), "c": one.to(dtype)}
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    raw, framed = serialized_size(tensors)
    assert raw == (15 + 14 + 1) * dtype.itemsize
    assert framed == len(save(tensors))


def test_serialized_size_of_nothing_is_an_empty_header() -> None:
    assert serialized_size({}) == (0, len(save({})))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_saved_tensors_and_values_come_back(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = {"a": torch.arange(6).reshape(2, 3).to(dtype), "scalar": torch.tensor(1).to(dtype)}
    meta = {"round": 3, "best": [0.5, None], "é": {"x": True}}
    save_tensors(tmp_path / "new" / "state.safetensors", tensors, meta)
    loaded, values = load_tensors(tmp_path / "new" / "state.safetensors")
    assert values == meta
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[n], t) and loaded[n].dtype == dtype for n, t in tensors.items())


def test_transposed_tensors_and_parameters_are_saved_by_value(tmp_path: Path) -> None:
    parameter = nn.Parameter(torch.arange(6.0).reshape(2, 3))
    save_tensors(tmp_path / "s", {"t": parameter.T, "p": parameter.detach().clone()}, {})
    assert load_tensors(tmp_path / "s")[0]["t"].tolist() == [[0, 3], [1, 4], [2, 5]]


def test_saving_replaces_the_file_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    save_tensors(path, {"a": torch.zeros(3)}, {"round": 0})
    old = path.read_bytes()
    with path.open("rb") as reader:
        save_tensors(path, {"a": torch.ones(3)}, {"round": 1})
        assert reader.read() == old
    assert load_tensors(path)[1] == {"round": 1}
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "foreign"])
def test_a_damaged_or_foreign_file_is_refused_by_name(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    save_tensors(path, {"a": torch.zeros(30)}, {})
    content = {"cut": path.read_bytes()[:-8], "empty": b"", "text": b"not a tensor at all, but a longer text"}
    if damage == "foreign":
        save_file({"a": torch.zeros(3)}, path, metadata={"format": "pt"})
    else:
        path.write_bytes(content[damage])
    with pytest.raises(ParameterError, match=r"state\.safetensors: not a readable state file"):
        load_tensors(path)


def test_a_tensor_that_changed_on_disk_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    save_tensors(path, {"a": torch.zeros(30)}, {"round": 1})
    content = bytearray(path.read_bytes())
    content[-7] ^= 1
    path.write_bytes(content)
    with pytest.raises(ParameterError, match=r"state\.safetensors: not a readable .*its checksum is not that of its"):
        load_tensors(path)


@pytest.mark.parametrize("change", [{"b": torch.zeros(6)}, {"a": torch.zeros(3, 2)}, {"a": torch.zeros(6).int()}])
def test_names_shapes_and_types_are_in_the_checksum(change: dict[str, torch.Tensor], tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    save_tensors(path, {"a": torch.zeros(6)}, {})
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    save_file({"a": torch.zeros(6)}, path, metadata=metadata)
    assert load_tensors(path)[1] == {}
    save_file(change, path, metadata=metadata)
    with pytest.raises(ParameterError, match="its checksum"):
        load_tensors(path)


def test_a_file_without_a_checksum_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    save_file({"a": torch.zeros(3)}, path, metadata={"fedcmt": "{}"})
    with pytest.raises(ParameterError, match=r"has no 'fedcmt_sha256': of another program or version"):
        load_tensors(path)


def test_a_state_of_another_kind_is_refused_by_what_it_lacks(tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    save_tensors(path, {}, {"round": 1, "best": 0.5})
    assert load_tensors(path, needs=["round"])[1]["round"] == 1
    with pytest.raises(ParameterError, match=r"state\.safetensors: .*it lacks \[optimizer, random\]"):
        load_tensors(path, needs=["round", "random", "optimizer"])


def two_states(folder: Path) -> tuple[Path, Path]:
    """The newest, of round 1, and the one before it."""
    newest, before = folder / "last.safetensors", folder / "previous.safetensors"
    for round_idx in range(2):
        save_tensors(newest, {"a": torch.full((3,), float(round_idx))}, {"round": round_idx}, before=before)
    return newest, before


def test_the_state_before_the_newest_is_kept_and_no_other(tmp_path: Path) -> None:
    newest, before = two_states(tmp_path)
    save_tensors(newest, {}, {"round": 2}, before=before)
    assert [load_tensors(path)[1]["round"] for path in (newest, before)] == [2, 1]
    assert sorted(tmp_path.iterdir()) == [newest, before]


def test_a_write_that_fails_leaves_both_states_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: int) -> None:
        raise OSError("disk full")

    newest, before = two_states(tmp_path)
    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        save_tensors(newest, {}, {"round": 2}, before=before)
    assert [load_tensors(path)[1]["round"] for path in (newest, before)] == [1, 0]
    assert sorted(tmp_path.iterdir()) == [newest, before]


def test_the_newest_state_is_loaded_and_the_one_before_it_stays(tmp_path: Path) -> None:
    newest, before = two_states(tmp_path)
    assert load_newest(newest, before)[1]["round"] == 1
    assert before.exists()
    before.unlink()
    assert load_newest(newest, before)[1]["round"] == 1


def test_a_damaged_newest_state_is_named_kept_and_replaced_by_the_one_before_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    newest, before = two_states(tmp_path)
    newest.write_bytes(b"torn")
    with caplog.at_level(logging.ERROR):
        tensors, meta = load_newest(newest, before)
    assert (meta["round"], tensors["a"].tolist()) == (0, [0, 0, 0])
    assert "last.safetensors: not a readable state file" in caplog.text
    assert (tmp_path / "last.safetensors.damaged").read_bytes() == b"torn"
    assert load_tensors(newest)[1]["round"] == 0
    assert not before.exists()  # so that the next state does not push a good one out for a damaged one


def test_where_the_newest_state_was_not_completed_the_one_before_it_is_loaded(tmp_path: Path) -> None:
    newest, before = two_states(tmp_path)
    newest.unlink()
    assert load_newest(newest, before)[1]["round"] == 0
    assert [path.name for path in tmp_path.iterdir()] == ["last.safetensors"]


def test_two_damaged_states_are_both_named_and_stay(tmp_path: Path) -> None:
    newest, before = two_states(tmp_path)
    for path in (newest, before):
        path.write_bytes(b"torn")
    with pytest.raises(ParameterError, match=r"last\.safetensors: .* state before it .*previous\.safetensors: not a"):
        load_newest(newest, before)
    assert sorted(tmp_path.iterdir()) == [newest, before]


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_only_a_tensor_with_all_its_numbers_is_dense() -> None:
    tensor = torch.ones(2, 3)
    assert is_dense(tensor)
    quantized = torch._empty_affine_quantized([2], scale=1.0, zero_point=0, dtype=torch.qint8)
    for other in (tensor.to_sparse(), tensor.to("meta"), quantized, tensor.numpy(), None):
        assert not is_dense(other)


def test_a_state_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"gone\.safetensors: no such state file"):
        load_tensors(tmp_path / "gone.safetensors")


def test_rows_are_taken_and_put_back_where_they_were() -> None:
    tensors = {"a": torch.arange(6.0).reshape(3, 2), "b": torch.tensor([1.0, 2.0]), "c": torch.zeros(2)}
    rows: dict[str, list[int]] = {"a": [2, 0], "c": []}
    parts = take_rows(tensors, rows)
    assert set(parts) == {"a", "b"}
    assert parts["a"].tolist() == [[4, 5], [0, 1]]
    parts["a"] += 10
    whole = put_rows(tensors, parts, rows, where="here")
    assert whole["a"].tolist() == [[10, 11], [2, 3], [14, 15]]
    assert whole["b"] is parts["b"]
    assert torch.equal(whole["c"], tensors["c"])
    assert tensors["a"].tolist() == [[0, 1], [2, 3], [4, 5]]


@pytest.mark.parametrize(
    ("rows", "parts"),
    [
        ({"a": [3]}, {"a": torch.zeros(1, 2)}),
        ({"a": [-1]}, {"a": torch.zeros(1, 2)}),
        ({"z": [0]}, {"z": torch.zeros(1, 2)}),
        ({"a": [0]}, {"a": torch.zeros(2, 2)}),
        ({"a": [0]}, {}),
    ],
)
def test_rows_that_do_not_fit_are_refused(rows: dict[str, list[int]], parts: dict[str, torch.Tensor]) -> None:
    with pytest.raises(ParameterError, match="here"):
        put_rows({"a": torch.zeros(3, 2)}, parts, rows, where="here")
