"""Distillation on hand-computed logits."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import expit, rel_entr, softmax
from torch import Tensor
from torch.nn.functional import one_hot

from fedcmt.algorithms.distillation import Distillation, read_distillation

TEACHER, STUDENT = torch.tensor([[2.0, 0.0, -1.0]]), torch.tensor([[1.0, 1.0, 0.0]])
LN3 = math.log(3)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return 3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def logits_of(labels: Tensor, num_classes: int) -> Tensor:
    """Logits [B, K, *spatial] whose argmax is ``labels`` [B, *spatial]."""
    return one_hot(labels, num_classes).movedim(-1, 1).float()


def value_and_gradient(
    student: Tensor, teacher: Tensor, temperature: float = 1.0, **options: Any
) -> tuple[float, Tensor]:
    leaf = student.clone().requires_grad_()
    value = Distillation(temperature=temperature).divergence(leaf, teacher, **options)
    value.backward()
    assert leaf.grad is not None
    return value.item(), leaf.grad


# Divergence


def test_oracle_kl_is_the_cross_entropy_less_the_teacher_s_entropy() -> None:
    value, gradient = value_and_gradient(STUDENT, TEACHER, regions=False)
    assert value == pytest.approx(0.3797382535, abs=1e-6)
    entropy = -(TEACHER.softmax(1) * TEACHER.log_softmax(1)).sum().item()
    assert value + entropy == pytest.approx(0.9040048702, abs=1e-6)  # cross-entropy summed over classes
    assert (value + entropy) / 3 == pytest.approx(0.3013349568, abs=1e-6)  # the released code's mean over classes
    expected = torch.tensor([[-0.4214759362, 0.3081235989, 0.1133523374]])
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-6)
    # What the released code calls the loss where student and teacher agree, and 0 is right: a third of the entropy.
    assert entropy / 3 == pytest.approx(0.1747555389, abs=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("regions", [False, True])
@pytest.mark.parametrize("shape", [(1, 3), (2, 3, 4, 5), (2, 3, 4, 5, 6)])
def test_oracle_agreement_is_0_to_the_bit(shape: tuple[int, ...], regions: bool, temperature: float) -> None:
    logits = noise(*shape)
    value, gradient = value_and_gradient(logits, logits.clone(), temperature, regions=regions)
    assert value == 0
    assert torch.equal(gradient, torch.zeros_like(gradient))


def test_a_region_is_a_bernoulli_divergence_and_regions_add_up() -> None:
    # p_T = (1/2, 3/4), p_S = (3/4, 1/2): ln(4/3) / 2 + (3/4 ln(3/2) + 1/4 ln(1/2)); gradient p_S - p_T.
    value, gradient = value_and_gradient(torch.tensor([[LN3, 0.0]]), torch.tensor([[0.0, LN3]]), regions=True)
    assert value == pytest.approx(0.1438410362 + 0.1308120359, abs=1e-6)
    torch.testing.assert_close(gradient, torch.tensor([[0.25, -0.25]]))


@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 4, 5), (2, 3, 1, 4, 5)])
@pytest.mark.parametrize("regions", [False, True])
def test_outputs_are_along_axis_1_and_voxels_are_averaged(shape: tuple[int, ...], regions: bool) -> None:
    student, teacher = noise(*shape, seed=1), noise(*shape, seed=2)
    s, t = student.double().numpy(), teacher.double().numpy()
    if regions:
        expected = (rel_entr(expit(t), expit(s)) + rel_entr(expit(-t), expit(-s))).sum(1).mean()
    else:
        expected = rel_entr(softmax(t, axis=1), softmax(s, axis=1)).sum(1).mean()
    value, _ = value_and_gradient(student, teacher, regions=regions)
    assert value == pytest.approx(expected, rel=1e-5)


def test_the_temperature_divides_logits_and_its_square_multiplies() -> None:
    # z_T / 4 = (ln 3, 0): p_T = (3/4, 1/4), p_S = (1/2, 1/2); gradient 4 (p_S - p_T).
    value, gradient = value_and_gradient(torch.zeros(1, 2), torch.tensor([[4 * LN3, 0.0]]), 4.0, regions=False)
    assert value == pytest.approx(16 * 0.1308120359, abs=1e-5)
    torch.testing.assert_close(gradient, torch.tensor([[-1.0, 1.0]]))


def test_the_gradient_keeps_its_scale_as_the_temperature_grows() -> None:
    # The limit is (z_S - z_T) / K for logits of mean 0; without τ² it would be 0.
    student, teacher = torch.zeros(1, 2), torch.tensor([[1.0, -1.0]])
    for temperature in (30.0, 100.0):
        _, gradient = value_and_gradient(student, teacher, temperature, regions=False)
        torch.testing.assert_close(gradient, torch.tensor([[-0.5, 0.5]]), rtol=1e-3, atol=0)


@pytest.mark.parametrize("regions", [False, True])
def test_voxels_that_do_not_count_change_neither_value_nor_gradient(regions: bool) -> None:
    student, teacher = noise(2, 3, 1, 4, seed=1), noise(2, 3, 1, 4, seed=2)
    valid = torch.tensor([[[True, False, True, True]], [[False, False, True, False]]])
    value, gradient = value_and_gradient(student, teacher, regions=regions, valid=valid)
    chosen = [z.movedim(1, -1)[valid] for z in (student, teacher)]  # [4, 3]
    expected, expected_gradient = value_and_gradient(*chosen, regions=regions)
    assert value == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(gradient.movedim(1, -1)[valid], expected_gradient)
    assert not gradient.movedim(1, -1)[~valid].any()


@pytest.mark.parametrize("regions", [False, True])
@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 4, 5)])
def test_nothing_that_counts_is_a_0_that_can_be_differentiated(shape: tuple[int, ...], regions: bool) -> None:
    valid = torch.zeros(shape[0], *shape[2:], dtype=torch.bool)
    value, gradient = value_and_gradient(noise(*shape, seed=1), noise(*shape, seed=2), regions=regions, valid=valid)
    assert value == 0
    assert torch.equal(gradient, torch.zeros(shape))


def test_no_gradient_reaches_the_teacher() -> None:
    student, teacher = STUDENT.clone().requires_grad_(), TEACHER.clone().requires_grad_()
    Distillation().divergence(student, teacher, regions=False).backward()
    assert student.grad is not None
    assert teacher.grad is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_logits_of_1e4_keep_value_and_gradient(dtype: torch.dtype) -> None:
    teacher, student = torch.tensor([[1e4, -1e4]], dtype=dtype), torch.tensor([[-1e4, 1e4]], dtype=dtype)
    # All of the teacher's mass lies where the student's log-probability is -2e4; as regions, twice -1e4.
    for regions in (False, True):
        value, gradient = value_and_gradient(student, teacher, regions=regions)
        assert value == 2e4
        assert gradient.tolist() == [[-1.0, 1.0]]


def test_a_large_offset_of_the_logits_cancels_nothing() -> None:
    value, _ = value_and_gradient(STUDENT + 1e4, TEACHER - 1e4, regions=False)
    assert value == pytest.approx(0.3797382535, abs=1e-6)


@pytest.mark.parametrize("regions", [False, True])
def test_autocast_changes_no_bit(regions: bool) -> None:
    student, teacher = noise(2, 3, 4, 5, seed=1), noise(2, 3, 4, 5, seed=2)
    plain = Distillation().divergence(student, teacher, regions=regions)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = Distillation().divergence(student, teacher, regions=regions)
    assert cast.dtype == torch.float32
    assert torch.equal(cast, plain)


@pytest.mark.parametrize("regions", [False, True])
def test_half_precision_logits_are_computed_with_in_float32(regions: bool) -> None:
    student, teacher = noise(2, 3, 4, 5, seed=1).half(), noise(2, 3, 4, 5, seed=2).half()
    divergence = Distillation(temperature=3.0).divergence(student, teacher, regions=regions)
    assert divergence.dtype == torch.float32
    assert torch.equal(
        divergence, Distillation(temperature=3.0).divergence(student.float(), teacher.float(), regions=regions)
    )


def test_logits_of_different_shapes_are_never_broadcast() -> None:
    with pytest.raises(ValueError, match=r"teacher's logits: torch\.float32 \(2, 3, 1\), expected .* \(2, 3, 4\)"):
        Distillation().divergence(torch.zeros(2, 3, 4), torch.zeros(2, 3, 1), regions=False)


@pytest.mark.parametrize(
    "valid", [torch.ones(2, 1, 4, dtype=torch.bool), torch.ones(1, 4, dtype=torch.bool), torch.ones(2, 4)]
)
def test_a_mask_of_another_shape_or_type_is_refused(valid: Tensor) -> None:
    with pytest.raises(ValueError, match=r"distillation: valid: .* expected bool \(2, 4\)"):
        Distillation().divergence(torch.zeros(2, 3, 4), torch.zeros(2, 3, 4), regions=False, valid=valid)


# Coefficient


def test_the_ramp_is_straight_from_start_in_round_1_to_the_maximum_in_the_last() -> None:
    ramp = Distillation(maximum=2.0, start=0.25)
    # 2 (1/4 + 3/4 k/3)
    assert [ramp.coefficient(r, 5) for r in range(5)] == [0.0, 0.5, 1.0, 1.5, 2.0]


def test_the_default_ramp() -> None:
    values = [Distillation().coefficient(r, 12) for r in (0, 1, 6, 11)]
    assert values == pytest.approx([0.0, 0.01, 0.505, 1.0])


def test_a_job_that_goes_on_longer_stays_at_the_maximum() -> None:
    assert [Distillation(maximum=2.0).coefficient(r, 5) for r in (5, 50)] == [2.0, 2.0]


def test_short_jobs() -> None:
    assert [Distillation().coefficient(r, 1) for r in (0, 1)] == [0.0, 1.0]
    assert [Distillation().coefficient(r, 2) for r in (0, 1, 2)] == [0.0, 1.0, 1.0]
    assert [Distillation().coefficient(r, 3) for r in (0, 1, 2)] == [0.0, 0.01, 1.0]


def test_maximum_0_switches_it_off() -> None:
    assert {Distillation(maximum=0).coefficient(r, 5) for r in range(7)} == {0.0}


def test_a_negligible_coefficient_is_exactly_0() -> None:
    values = [Distillation(maximum=0.05, start=0.01).coefficient(r, 12) for r in (1, 2)]
    assert values[0] == 0.0  # 0.0005
    assert values[1] == pytest.approx(0.05 * (0.01 + 0.99 / 10))
    assert Distillation(maximum=1e-3).coefficient(1, 2) == 1e-3


# Trust


def test_trust_in_labels_is_the_mean_foreground_dice_over_the_batch() -> None:
    teacher = logits_of(torch.tensor([[[1, 1, 0]], [[2, 0, 0]]]), 4)
    target = torch.tensor([[[1, 0, 0]], [[1, 2, 2]]]).unsqueeze(1)
    # Label 1: 2 * 1 / (2 + 2); label 2: 2 * 0 / (1 + 2); label 3 does not occur.
    for dtype in (torch.int16, torch.float32):
        assert Distillation().trust(teacher, target.to(dtype), regions=False).item() == 0.25


def test_trust_leaves_out_voxels_that_do_not_count() -> None:
    teacher = logits_of(torch.tensor([[[1, 1, 0]], [[2, 0, 0]]]), 4)
    target = torch.tensor([[[1, 0, 9]], [[1, 2, 2]]]).unsqueeze(1)
    valid = torch.tensor([[[True, True, False]], [[False, False, False]]])
    # Label 1: 2 * 1 / (2 + 1); label 2 does not occur.
    assert Distillation().trust(teacher, target, regions=False, valid=valid).item() == pytest.approx(2 / 3)


def test_trust_in_regions_is_their_mean_dice_over_the_batch() -> None:
    # Probabilities above 1/2 are logits above 0; 0 itself is not in the region.
    teacher = torch.tensor([[[0.1, 5.0, 0.0, -1.0], [0.1, -2.0, -2.0, -2.0], [-1.0, -1.0, -1.0, -1.0]]])
    target = torch.tensor([[[1, 0, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]]])
    # 2 * 1 / (2 + 2); 2 * 1 / (1 + 1); the third does not occur.
    for dtype in (torch.bool, torch.int16, torch.float32):
        assert Distillation().trust(teacher, target.to(dtype), regions=True).item() == 0.75
    valid = torch.tensor([[False, True, True, True]])
    # 2 * 0 / (1 + 1); the others do not occur.
    assert Distillation().trust(teacher, target, regions=True, valid=valid).item() == 0.0


def test_trust_is_1_where_there_is_no_foreground_and_0_where_the_teacher_invents_some() -> None:
    background, target = torch.zeros(1, 2, 3, dtype=torch.int64), torch.zeros(1, 1, 2, 3)
    assert Distillation().trust(logits_of(background, 2), target, regions=False).item() == 1.0
    assert Distillation().trust(logits_of(background + 1, 2), target, regions=False).item() == 0.0


def test_trust_in_classes_is_the_accuracy_over_known_ones() -> None:
    teacher = logits_of(torch.tensor([0, 1, 2, 1]), 3)
    target = torch.tensor([0, 1, 1, -1])
    assert Distillation().trust(teacher, target, regions=False).item() == pytest.approx(2 / 3)
    valid = torch.tensor([True, True, False, True])
    assert Distillation().trust(teacher, target, regions=False, valid=valid).item() == 1.0
    assert Distillation().trust(teacher[:2], torch.tensor([-1, -1]), regions=False).item() == 1.0


@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 4)])
def test_trust_is_a_float32_without_gradient(shape: tuple[int, ...]) -> None:
    teacher = torch.zeros(shape, dtype=torch.float16, requires_grad=True)
    for fill in (-1, 1):  # nothing to compare with, and something
        target = torch.full((2, 1, 4) if len(shape) > 2 else (2,), fill)
        trust = Distillation().trust(teacher, target, regions=False)
        assert (trust.dtype, trust.shape, trust.requires_grad) == (torch.float32, (), False)


@pytest.mark.parametrize(
    ("shape", "target", "regions"),
    [((2, 3, 4), (2, 4), False), ((2, 3, 4), (2, 3, 4), False), ((2, 3, 4), (2, 1, 4), True), ((2, 3), (2, 1), False)],
)
def test_a_target_of_another_shape_is_refused(shape: tuple[int, ...], target: tuple[int, ...], regions: bool) -> None:
    with pytest.raises(ValueError, match=r"distillation: target: .* expected \(2,"):
        Distillation().trust(torch.zeros(shape), torch.zeros(target), regions=regions)


# Settings


def test_settings_from_a_job() -> None:
    assert read_distillation({}) == Distillation(maximum=1.0, temperature=1.0, start=0.01, gate=False)
    assert read_distillation({"maximum": 0.5, "gate": True}) == Distillation(maximum=0.5, gate=True)


def test_unknown_settings_are_refused_with_the_known_ones() -> None:
    with pytest.raises(TypeError, match=r"unknown keys \['max'\]; known keys: \['gate', 'maximum', 'start', 'temp"):
        read_distillation({"max": 1.0})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("maximum", -0.1), ("maximum", np.inf), ("maximum", True), ("maximum", "1"), ("temperature", 0),
        ("temperature", np.nan), ("start", -0.01), ("start", 1.01), ("start", None), ("gate", 1), ("gate", "yes"),
    ],
)  # fmt: skip
def test_values_out_of_range_are_refused_by_name(key: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"distillation: {key} is .*, expected"):
        read_distillation({key: value})
