"""The membership attack's numbers: what leaks nothing counts nothing, however sites differ."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import membership
import numpy as np
import pytest


def test_certainty_and_a_coin() -> None:
    low, high = np.array([0.1, 0.2, 0.3]), np.array([0.6, 0.7])
    assert membership.auc(low, high) == 1
    assert membership.auc(high, low) == 0
    assert membership.auc(low, low) == 0.5
    assert membership.advantage(low, high) == pytest.approx(2 / 3)  # 0.3 is above the mean of its like
    assert membership.advantage(low, low) == 0


def test_sites_whose_losses_differ_leak_nothing_by_that() -> None:
    random = np.random.default_rng(1)
    easy, hard = (random.normal(mean, 0.05, 4000) for mean in (0.3, 0.6))
    # Half of the members are easy, and a fifth of the others: pooled, members would have the smaller loss.
    losses = [(easy[:2000], easy[2000:2500]), (hard[:2000], hard[2000:])]
    pooled = [np.concatenate(kind) for kind in zip(*losses, strict=True)]
    assert membership.auc(*pooled) > 0.6
    for measure, nothing in ((membership.advantage, 0.0), (membership.auc, 0.5)):
        mean, low, high = (float(word.strip("[,]")) for word in membership.interval(measure, losses, 200).split())
        assert mean == pytest.approx(nothing, abs=0.05)
        assert low < nothing < high
