"""Flat clipping on tensors of a few values."""

import math

import pytest
import torch

from fedcmt.params import ParameterError, Params, norm
from fedcmt.privacy.clipping import clip_flat


def values(params: Params) -> dict[str, list]:
    return {name: tensor.tolist() for name, tensor in params.items()}


def test_t1_an_update_is_scaled_onto_the_bound() -> None:
    clipped, before = clip_flat({"d": torch.tensor([3.0, 4.0])}, 1.0)
    assert clipped["d"].tolist() == pytest.approx([0.6, 0.8])
    assert before == 5.0


def test_t1_an_update_inside_the_bound_is_what_it_was() -> None:
    clipped, before = clip_flat({"d": torch.tensor([3.0, 4.0])}, 10.0)
    assert values(clipped) == {"d": [3.0, 4.0]}
    assert before == 5.0


def test_t1_a_zero_update_stays_zero() -> None:
    assert values(clip_flat({"d": torch.zeros(2)}, 1.0)[0]) == {"d": [0.0, 0.0]}
    assert clip_flat({}, 1.0) == ({}, 0.0)


def test_t2_one_factor_holds_for_all_tensors() -> None:
    clipped, before = clip_flat({"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([0.0, 4.0])}, 1.0)
    assert clipped["a"].tolist() == pytest.approx([0.6, 0.0])
    assert clipped["b"].tolist() == pytest.approx([0.0, 0.8])
    assert before == 5.0


def test_t3_the_mean_of_two_clipped_updates() -> None:
    received = torch.tensor([1.0, 1.0])
    deltas = [{"w": torch.tensor([3.0, 4.0])}, {"w": torch.tensor([0.0, 0.5])}]
    mean = torch.stack([clip_flat(delta, 1.0)[0]["w"] for delta in deltas]).sum(0) / 2
    assert (received + mean).tolist() == pytest.approx([1.3, 1.65])


def clipped_after(steps: list[torch.Tensor], bound: float, *, each: bool) -> Params:
    """Where steps lead that are clipped each, or once at the end."""
    delta = {"w": torch.zeros(2)}
    for step in steps:
        delta = {"w": delta["w"] + step}
        if each:
            delta, _ = clip_flat(delta, bound)
    return clip_flat(delta, bound)[0]


def test_t4_clipping_each_step_and_once_agree_inside_the_ball_only() -> None:
    steps = [torch.tensor([3.0, 4.0]), torch.tensor([-0.8, 0.6])]
    inside = [clipped_after(steps, 10.0, each=each)["w"] for each in (True, False)]
    outside = [clipped_after(steps, 1.0, each=each) for each in (True, False)]
    assert torch.equal(*inside)
    # Each: (0.6, 0.8) + (-0.8, 0.6) = (-0.2, 1.4); once: (2.2, 4.6). Both then have norm 1.
    assert outside[0]["w"].tolist() == pytest.approx([-0.2 / math.sqrt(2), 1.4 / math.sqrt(2)])
    assert outside[1]["w"].tolist() == pytest.approx([2.2 / math.sqrt(26), 4.6 / math.sqrt(26)])
    assert all(norm(delta) <= 1 + 1e-6 for delta in outside)


@pytest.mark.parametrize("bound", [1e-6, 0.1, 1 / 3, 7.7, 1e3])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e20])
def test_the_norm_afterwards_is_within_the_bound(bound: float, scale: float) -> None:
    generator = torch.Generator().manual_seed(1)
    delta = {name: scale * torch.randn(5, 7, 11, generator=generator) for name in "abc"}
    clipped, before = clip_flat(delta, bound)
    assert norm(clipped) <= bound * (1 + 1e-6)
    assert norm(clipped) == pytest.approx(min(bound, before), rel=1e-6)
    assert before == pytest.approx(norm(delta))


def test_squares_that_single_precision_cannot_hold_are_summed() -> None:
    assert norm({"a": torch.tensor([3e20]), "b": torch.tensor([[4e20]])}) == pytest.approx(5e20)
    assert norm({"a": torch.tensor([3e-30]), "b": torch.tensor([[4e-30]])}) == pytest.approx(5e-30)


@pytest.mark.parametrize("bound", [1.0, 10.0])
def test_the_update_itself_is_left_alone(bound: float) -> None:
    delta = {"d": torch.tensor([3.0, 4.0])}
    clip_flat(delta, bound)[0]["d"].zero_()
    assert values(delta) == {"d": [3.0, 4.0]}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_shape_and_type_stay(dtype: torch.dtype) -> None:
    clipped, _ = clip_flat({"d": torch.ones(2, 3, dtype=dtype), "scalar": torch.tensor(2.0, dtype=dtype)}, 0.1)
    assert {name: (tuple(t.shape), t.dtype) for name, t in clipped.items()} == {
        "d": ((2, 3), dtype),
        "scalar": ((), dtype),
    }


@pytest.mark.parametrize("bound", [0, -1.0, math.nan, math.inf, True, "1"])
def test_a_bound_that_bounds_nothing_is_refused(bound: float) -> None:
    with pytest.raises(ValueError, match="clip_flat: bound is"):
        clip_flat({"d": torch.ones(2)}, bound)


@pytest.mark.parametrize(
    ("tensor", "reason"),
    [
        (torch.tensor([1.0, math.nan]), "not finite: \\[b\\]"),
        (torch.tensor([math.inf]), "not finite: \\[b\\]"),
        (torch.tensor([1]), "not floating point: \\[b torch.int64\\]"),
        (torch.ones(2, dtype=torch.float16), "too few bits: \\['b torch.float16'\\]"),
        (torch.ones(2, dtype=torch.bfloat16), "too few bits: \\['b torch.bfloat16'\\]"),
    ],
)
def test_what_cannot_be_bounded_is_refused_by_name(tensor: torch.Tensor, reason: str) -> None:
    with pytest.raises(ParameterError, match=reason):
        clip_flat({"a": torch.ones(2), "b": tensor}, 1.0)
