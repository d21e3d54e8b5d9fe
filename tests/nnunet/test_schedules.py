"""Schedules as functions of the step."""

import math

import pytest
import torch

from fedcmt.nnunet.schedules import ExponentialPolyLR


@pytest.mark.parametrize(
    ("step", "rate"),
    [(0, 0.01), (3, 0.01 * 0.7**0.9), (5, 0.01 * math.exp(-0.015) * 0.5**0.9), (9, 0.01 * math.exp(-0.015) * 0.1**0.9)],
)
def test_the_rate_falls_with_steps_and_once_more_with_rounds(step: int, rate: float) -> None:
    optimizer = torch.optim.SGD([torch.zeros(2, requires_grad=True)], lr=0.5)
    schedule = ExponentialPolyLR(optimizer, 0.01, total_steps=10, steps_per_round=5)
    schedule.step(step)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(rate)
