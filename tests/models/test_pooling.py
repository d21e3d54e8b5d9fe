"""Log-sum-exp pooling against hand-computed numbers."""

import pytest
import torch
from torch import Tensor

from fedcmt.models.pooling import log_sum_exp_pool


def line(*values: float) -> Tensor:
    """One sample, one class, the values along the second of two axes: [1, 1, 1, V]."""
    return torch.tensor(values).view(1, 1, 1, -1)


def test_oracle_of_sharpness_5() -> None:
    logits = line(0.0, 1.0, 2.0, 3.0).requires_grad_()
    pooled = log_sum_exp_pool(logits, sharpness=5.0)
    pooled.sum().backward()
    assert pooled.item() == pytest.approx(2.7240932773, abs=1e-6)
    expected = torch.tensor([3.0380e-7, 4.5094e-5, 0.0066925471, 0.9932620550]).view_as(logits)
    torch.testing.assert_close(logits.grad, expected, rtol=2e-4, atol=0)
    # A hand-written backward with a further 1/r would sum to 0.2.
    assert logits.grad.sum().item() == pytest.approx(1.0, abs=1e-6)


def test_the_published_sharpness_is_the_default() -> None:
    assert log_sum_exp_pool(line(0.0, 1.0, 2.0, 3.0)).item() == pytest.approx(2.7240932773, abs=1e-6)


def test_ln_2_by_hand() -> None:
    # r = 1: exp gives 1 and 3, their mean is 2.
    assert log_sum_exp_pool(torch.tensor([[[1.0, 3.0]]]).log(), sharpness=1.0).item() == pytest.approx(0.6931471806)


@pytest.mark.parametrize("value", [-1e4, -10.0, 0.0, 12.0, 1e4])
def test_a_constant_map_pools_to_its_value(value: float) -> None:
    assert log_sum_exp_pool(torch.full((1, 2, 3, 4, 5), value)).tolist() == [[pytest.approx(value, abs=1e-6)] * 2]


@pytest.mark.parametrize("sharpness", [0.1, 5.0, 100.0])
def test_it_lies_between_mean_and_maximum(sharpness: float) -> None:
    logits = torch.randn(2, 3, 4, 5, 6, generator=torch.Generator().manual_seed(0))
    pooled = log_sum_exp_pool(logits, sharpness)
    assert (pooled < logits.amax((2, 3, 4))).all()
    assert (pooled > logits.mean((2, 3, 4))).all()


def test_sharpness_goes_from_mean_to_maximum() -> None:
    logits = line(0.0, 1.0, 2.0, 5.0).double()
    assert log_sum_exp_pool(logits, 1e-6).item() == pytest.approx(2.0, abs=1e-5)
    assert log_sum_exp_pool(logits, 1e6).item() == pytest.approx(5.0, abs=1e-5)


@pytest.mark.parametrize("spatial", [(3, 4), (3, 4, 5)])
def test_each_sample_and_class_is_pooled_over_its_own_voxels(spatial: tuple[int, ...]) -> None:
    offsets = torch.tensor([[0.0, 10.0, 20.0], [100.0, 110.0, 120.0]])
    pattern = torch.randn(spatial, generator=torch.Generator().manual_seed(0))
    pooled = log_sum_exp_pool(offsets.view(2, 3, *[1] * len(spatial)) + pattern)
    assert pooled.shape == (2, 3)
    torch.testing.assert_close(pooled - offsets, pooled[:1, :1].expand(2, 3), rtol=0, atol=1e-4)


@pytest.mark.parametrize(("dtype", "value"), [(torch.float16, 60000.0), (torch.bfloat16, 2.0**100)])
def test_half_precision_does_not_overflow(dtype: torch.dtype, value: float) -> None:
    logits = torch.tensor([-value, value], dtype=dtype).view(1, 1, 1, 2).requires_grad_()
    pooled = log_sum_exp_pool(logits)
    pooled.sum().backward()
    assert pooled.dtype == torch.float32
    assert pooled.item() == pytest.approx(value, rel=1e-4)
    assert logits.grad.flatten().tolist() == [0.0, 1.0]


def test_autocast_changes_no_bit() -> None:
    logits = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        pooled = log_sum_exp_pool(logits)
    assert pooled.dtype == torch.float32
    assert torch.equal(pooled, log_sum_exp_pool(logits))


def test_the_gradient_is_that_of_finite_differences() -> None:
    logits = torch.randn(2, 3, 1, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert log_sum_exp_pool(logits).dtype == torch.float64
    assert torch.autograd.gradcheck(log_sum_exp_pool, (logits,))


@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 0, 4)])
def test_nothing_to_pool_over_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"expected \[B, K, \*spatial\] with voxels"):
        log_sum_exp_pool(torch.zeros(shape))


@pytest.mark.parametrize("sharpness", [0.0, -5.0, float("nan")])
def test_a_sharpness_that_is_not_positive_is_refused(sharpness: float) -> None:
    with pytest.raises(ValueError, match="expected a number above 0"):
        log_sum_exp_pool(torch.zeros(1, 1, 2), sharpness)
