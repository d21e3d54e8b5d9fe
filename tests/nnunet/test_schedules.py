"""Schedules as functions of the step."""

import math

import pytest
import torch

from fedcmt.nnunet.schedules import ExponentialPolyLR, RoundPolyLR


@pytest.mark.parametrize(
    ("step", "rate"),
    [(0, 0.01), (3, 0.01 * 0.7**0.9), (5, 0.01 * math.exp(-0.015) * 0.5**0.9), (9, 0.01 * math.exp(-0.015) * 0.1**0.9)],
)
def test_the_rate_falls_with_steps_and_once_more_with_rounds(step: int, rate: float) -> None:
    optimizer = torch.optim.SGD([torch.zeros(2, requires_grad=True)], lr=0.5)
    schedule = ExponentialPolyLR(optimizer, 0.01, total_steps=10, steps_per_round=5)
    schedule.step(step)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(rate)


@pytest.mark.parametrize(
    ("round_idx", "rate"), [(0, 2.0e-4), (1, 1.9982e-4), (500, 1.0718e-4), (999, 4e-7), (1000, 0.0)]
)
def test_oracle_23_the_rate_of_a_round_as_fedmepd_trains(round_idx: int, rate: float) -> None:
    optimizer = torch.optim.Adam([torch.zeros(2, requires_grad=True)], lr=0.5)
    schedule = RoundPolyLR(optimizer, 2e-4, rounds=1000)
    schedule.step(round_idx)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(rate, rel=0, abs=5e-9)
    assert optimizer.param_groups[0]["lr"] == round(optimizer.param_groups[0]["lr"], 8)


def test_a_rate_that_would_be_rounded_to_nothing_is_refused_before_training() -> None:
    optimizer = torch.optim.Adam([torch.zeros(2, requires_grad=True)], lr=0.5)
    with pytest.raises(ValueError, match=r"lr 1e-06 .* the last of 1000 rounds has the rate 2\.0e-09"):
        RoundPolyLR(optimizer, 1e-6, rounds=1000)
