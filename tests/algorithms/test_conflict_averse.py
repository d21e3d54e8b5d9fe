"""Conflict-averse aggregation on small updates with known solutions; O1 to O14 solve CAGrad's problem."""

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from scipy.optimize import minimize
from torch import Tensor

from fedcmt.algorithms import conflict_averse
from fedcmt.algorithms.base import Update
from fedcmt.algorithms.conflict_averse import (
    GramMatrix,
    Solution,
    bernoulli_similarity,
    combine,
    leave_one_out_agreement,
    rescale,
    solve,
)
from fedcmt.algorithms.fedavg import weighted_mean
from fedcmt.params import ParameterError

Rows = Sequence[Sequence[float]]
Preference = Sequence[float] | np.ndarray
Mode = Literal[0, 1, 2]
SEEDS = range(25)
CLOSE = 1e-8
"""Rounding decides ties, so other arithmetic takes another path to the same gap of 1e-13."""


def solved(rows: Rows | np.ndarray, radius: float, preference: Preference | None = None) -> Solution:
    updates = np.array(rows, dtype=np.float64)
    return solve(updates @ updates.T, uniform(updates) if preference is None else preference, radius)


def uniform(updates: np.ndarray) -> np.ndarray:
    return np.full(len(updates), 1 / len(updates))


def direction(
    rows: Rows | np.ndarray, radius: float, mode: Mode = 0, preference: Preference | None = None
) -> np.ndarray:
    """d for updates given as rows."""
    coefficients = solved(rows, radius, preference).coefficients
    return rescale(coefficients, radius, mode) @ np.array(rows, dtype=np.float64)


def instance(seed: int) -> tuple[np.ndarray, np.ndarray, float]:
    """Random updates [N, d], preferences [N] and radius: from 2 to 8 sites, lengths up to some 10 times apart."""
    random = np.random.default_rng(seed)
    num_sites = int(random.integers(2, 9))
    updates = random.standard_normal((num_sites, 12)) * random.lognormal(0, 0.7, (num_sites, 1))
    return updates, random.dirichlet(np.ones(num_sites)), float(random.uniform(0.05, 0.95))


def assert_same_direction(one: np.ndarray, other: np.ndarray, updates: np.ndarray) -> None:
    """The same gain for the worst-off site to 1e-9, and the same d as far as such a gain determines it."""
    scale = np.linalg.norm(other)
    assert np.linalg.norm(one - other) <= CLOSE * scale
    assert (updates @ one).min() == pytest.approx((updates @ other).min(), abs=1e-9 * scale**2)


def named(rows: Rows, dtype: torch.dtype = torch.float32) -> dict[str, dict[str, Tensor]]:
    """Each row as the update of one site: a, b, ... with one tensor w."""
    names = "abcdefgh"[: len(rows)]
    return {site: {"w": torch.tensor(row, dtype=dtype)} for site, row in zip(names, rows, strict=True)}


def gram_of(updates: dict[str, dict[str, Tensor]]) -> GramMatrix:
    gram = GramMatrix()
    for site, update in updates.items():
        gram.add(site, update)
    return gram


def dense(updates: dict[str, dict[str, Tensor]], names: Sequence[str]) -> np.ndarray:
    """The Gram matrix in float64 and in one piece."""
    rows = np.stack([np.concatenate([updates[s][n].double().numpy().ravel() for n in names]) for s in sorted(updates)])
    return rows @ rows.T


def mixed_updates() -> dict[str, dict[str, Tensor]]:
    """Three sites with tensors of several sizes, one a scalar, one empty."""
    generator = torch.Generator().manual_seed(3)
    shapes = {"conv": (5, 3, 3), "bias": (17,), "scalar": (), "empty": (0, 4)}
    return {s: {n: torch.randn(shape, generator=generator) for n, shape in shapes.items()} for s in ("c", "a", "b")}


class TestOracles:
    @pytest.mark.parametrize("mode", [0, 1, 2])
    def test_o1_without_radius_is_the_mean(self, mode: Mode) -> None:
        d = direction([(1, 2), (3, -1), (0, 1)], 0.0, mode)
        assert d.tolist() == pytest.approx([1.3333333333, 0.6666666667], abs=1e-10)

    @pytest.mark.parametrize(("mode", "expected"), [(0, (4.2, 5.6)), (1, (3.6206896552, 4.8275862069)), (2, (3, 4))])
    def test_o2_equal_updates_only_gain_length(self, mode: Mode, expected: tuple[float, float]) -> None:
        assert direction([(3, 4)] * 4, 0.4, mode).tolist() == pytest.approx(expected, abs=1e-9)

    @pytest.mark.parametrize(("mode", "expected"), [(0, 0.7), (1, 0.6034482759)])
    def test_o3_equal_lengths_share_alike(self, mode: Mode, expected: float) -> None:
        assert solved([(1, 0), (0, 1)], 0.4).weights.tolist() == pytest.approx([0.5, 0.5])
        assert direction([(1, 0), (0, 1)], 0.4, mode).tolist() == pytest.approx([expected] * 2, abs=1e-9)

    @pytest.mark.parametrize(("mode", "expected"), [(0, (1, 1.0590169944)), (1, (0.8, 0.8472135955))])
    def test_o4_the_shorter_update_bounds_the_worst_case(self, mode: Mode, expected: tuple[float, float]) -> None:
        assert solved([(2, 0), (0, 1)], 0.5).weights.tolist() == [0, 1]
        assert direction([(2, 0), (0, 1)], 0.5, mode).tolist() == pytest.approx(expected, abs=1e-10)

    def test_o4_each_site_gains_by_so_much(self) -> None:
        gains = np.array([(2, 0), (0, 1)]) @ direction([(2, 0), (0, 1)], 0.5)
        assert gains.tolist() == pytest.approx([2, 1.0590169944], abs=1e-10)

    @pytest.mark.parametrize(
        ("mode", "expected"), [(0, (0.4578894168, 0.6868341253)), (1, (0.3663115335, 0.5494673002))]
    )
    def test_o5_inside_the_simplex_both_gain_alike(self, mode: Mode, expected: tuple[float, float]) -> None:
        rows = [(1, 0), (-0.5, 1)]
        solution = solved(rows, 0.5)
        assert solution.weights.tolist() == pytest.approx([0.6172534646, 0.3827465354], abs=1e-9)
        assert solution.iterations == 1  # two sites are solved in closed form
        assert direction(rows, 0.5, mode).tolist() == pytest.approx(expected, abs=1e-9)
        assert (np.array(rows) @ direction(rows, 0.5)).tolist() == pytest.approx([0.4578894168] * 2, abs=1e-9)

    def test_o6_opposed_updates_gain_more_than_by_the_mean(self) -> None:
        rows = [(1, 0), (-0.8, 0.6)]
        d = direction(rows, 0.4)
        assert d.tolist() == pytest.approx([0.14, 0.42], abs=1e-12)
        assert (np.array(rows) @ d).tolist() == pytest.approx([0.14, 0.14], abs=1e-12)

    def test_o7_on_one_line_the_direction_is_shorter(self) -> None:
        assert solved([(2, 0), (-1, 0)], 0.4).weights.tolist() == [0, 1]
        assert direction([(2, 0), (-1, 0)], 0.4).tolist() == pytest.approx([0.3, 0], abs=1e-12)

    def test_o8_opposite_updates_give_nothing(self) -> None:
        solution = solved([(1, 0), (-1, 0)], 0.4)
        assert direction([(1, 0), (-1, 0)], 0.4).tolist() == [0, 0]
        assert solution.pareto_stationary

    def test_o9_three_sites_gain_alike(self) -> None:
        rows = [(1, 0, 0), (0, 1, 0), (-1, -1, 1)]
        d = direction(rows, 0.5)
        weights = [0.4686091398, 0.4686091398, 0.0627817204]
        assert solved(rows, 0.5).weights.tolist() == pytest.approx(weights, abs=1e-8)
        assert d.tolist() == pytest.approx([0.117152285, 0.117152285, 0.3514568549], abs=1e-8)
        assert (np.array(rows) @ d).tolist() == pytest.approx([0.117152285] * 3, abs=1e-8)

    def test_o10_preferences_weigh_the_mean(self) -> None:
        solution = solved([(2, 0), (0, 1)], 0.5, (0.75, 0.25))
        d = direction([(2, 0), (0, 1)], 0.5, preference=(0.75, 0.25))
        assert solution.weights.tolist() == [0, 1]
        assert d.tolist() == pytest.approx([1.5, 1.0103453163], abs=1e-10)

    def test_o11_a_short_opposed_update_takes_the_weight(self) -> None:
        rows = [(10, 0), (-0.1, 0.1)]
        d = direction(rows, 0.4)
        assert solved(rows, 0.4).weights.tolist() == [0, 1]
        assert d.tolist() == pytest.approx([3.5498571501, 1.4501428499], abs=1e-9)
        assert (np.array(rows) @ d).tolist() == pytest.approx([35.4985715, -0.20997143], abs=1e-7)

    def test_o12_one_site_gains_by_the_radius(self) -> None:
        assert solved([(3, 4)], 0.4).weights.tolist() == [1]
        assert direction([(3, 4)], 0.4).tolist() == pytest.approx([4.2, 5.6], abs=1e-12)

    def test_o13_where_nothing_helps_all_the_mean_remains(self) -> None:
        rows = [(0, 1), (0, -1), (3, 0)]
        solution = solved(rows, 0.4)
        assert solution.pareto_stationary
        assert solution.weights.tolist() == pytest.approx([0.5, 0.5, 0], abs=1e-6)
        assert direction(rows, 0.4).tolist() == pytest.approx([1, 0], abs=1e-6)

    O14 = ((1, 2, 0), (-2, 1, 0.5), (0.5, -1, 1), (0, 0, -1))

    @pytest.mark.parametrize(
        ("radius", "weights", "expected", "worst"),
        [
            (0.2, (0, 0, 1, 0), (-0.08964466, 0.42928932, 0.19571068), -0.27840097),
            (0.4, (0, 0, 0.55971384, 0.44028616), (-0.03181353, 0.31362706, 0.16476691), -0.16476691),
            (0.8, (0, 0, 0.45324865, 0.54675135), (0.06158698, 0.12682604, 0.04801627), -0.04801627),
        ],
    )
    def test_o14_a_larger_radius_lifts_the_worst(
        self, radius: float, weights: tuple[float, ...], expected: tuple[float, ...], worst: float
    ) -> None:
        d = direction(self.O14, radius)
        assert solved(self.O14, radius).weights.tolist() == pytest.approx(weights, abs=1e-7)
        assert d.tolist() == pytest.approx(expected, abs=1e-8)
        gains = sorted(np.array(self.O14) @ d)
        assert gains[0] == pytest.approx(worst, abs=1e-8)
        if sum(w > 0 for w in weights) == 2:  # two sites bound the worst case, and both attain it
            assert gains[1] == pytest.approx(worst, abs=1e-8)

    def test_o14_the_mean_leaves_the_third_site_worst(self) -> None:
        assert min(np.array(self.O14) @ np.mean(self.O14, axis=0)) == -0.4375

    def test_o14_the_narrow_radius_helps_each_by_so_much(self) -> None:
        gains = np.array(self.O14) @ direction(self.O14, 0.2)
        assert gains.tolist() == pytest.approx([0.76893398, 0.70643398, -0.27840097, -0.19571068], abs=1e-8)

    def test_o14_blockwise_from_one_gram(self) -> None:
        updates = {
            site: {"first": update["w"][:2], "last": update["w"][2:]}
            for site, update in named(self.O14, torch.float64).items()
        }
        gram = gram_of(updates)
        whole = [[5, 0, -1.5, 0], [0, 5.25, -1.5, -0.5], [-1.5, -1.5, 2.25, -1], [0, -0.5, -1, 1]]
        assert gram.matrix().tolist() == whole
        d = {}
        for block in (["first"], ["last"]):
            solution = solve(gram.matrix(block), np.full(4, 0.25), 0.4, count_dropped=True)
            d |= combine(updates, solution.coefficients, block)
        assert [*d["first"].tolist(), *d["last"].tolist()] == pytest.approx([-0.03280456, 0.31560911, 0.075], abs=1e-7)


@pytest.mark.parametrize("seed", SEEDS)
class TestProperties:
    def test_mode_2_is_never_worse_or_longer_than_the_mean(self, seed: int) -> None:
        updates, p, c = instance(seed)
        mean, d = p @ updates, direction(updates, c, 2, p)
        assert (updates @ d).min() >= (updates @ mean).min() - 1e-9 * (mean @ mean)
        assert np.linalg.norm(d) <= np.linalg.norm(mean) * (1 + 1e-12)

    def test_the_order_of_sites_is_irrelevant(self, seed: int) -> None:
        updates, p, c = instance(seed)
        order = np.random.default_rng(seed).permutation(len(p))
        one, other = solved(updates, c, p), solved(updates[order], c, p[order])
        np.testing.assert_allclose(other.weights, one.weights[order], rtol=0, atol=CLOSE)
        assert_same_direction(other.coefficients @ updates[order], one.coefficients @ updates, updates)

    @pytest.mark.parametrize("scale", [1e-6, 1e-2, 1e6])
    def test_scale_carries_through(self, seed: int, scale: float) -> None:
        updates, p, c = instance(seed)
        assert_same_direction(direction(scale * updates, c, 0, p) / scale, direction(updates, c, 0, p), updates)

    def test_rotation_carries_through(self, seed: int) -> None:
        updates, p, c = instance(seed)
        rotation, _ = np.linalg.qr(np.random.default_rng(seed).standard_normal((12, 12)))
        rotated = updates @ rotation
        assert_same_direction(direction(rotated, c, 0, p), direction(updates, c, 0, p) @ rotation, rotated)

    def test_duplicating_all_sites_changes_nothing(self, seed: int) -> None:
        updates, p, c = instance(seed)
        twice = direction(np.concatenate([updates, updates]), c, 0, np.concatenate([p, p]) / 2)
        assert_same_direction(twice, direction(updates, c, 0, p), updates)

    def test_the_direction_is_on_the_ball(self, seed: int) -> None:
        updates, p, c = instance(seed)
        mean, d = p @ updates, direction(updates, c, 0, p)
        assert np.linalg.norm(d - mean) == pytest.approx(c * np.linalg.norm(mean), rel=1e-9)
        assert (1 - c) * (1 - 1e-9) <= np.linalg.norm(d) / np.linalg.norm(mean) <= (1 + c) * (1 + 1e-9)
        assert d @ mean >= (1 - c) * (mean @ mean) * (1 - 1e-9)

    def test_the_worst_gain_grows_with_the_radius(self, seed: int) -> None:
        updates, p, _ = instance(seed)
        mean = p @ updates
        worst = [(updates @ direction(updates, c, 0, p)).min() for c in (0.0, 0.1, 0.3, 0.5, 0.7, 0.9)]
        assert worst[0] == pytest.approx((updates @ mean).min(), rel=1e-12)
        assert all(right >= left - 1e-9 * (mean @ mean) for left, right in itertools.pairwise(worst))

    def test_the_dual_meets_the_worst_gain(self, seed: int) -> None:
        updates, p, c = instance(seed)
        mean, solution = p @ updates, solved(updates, c, p)
        chosen = solution.weights @ updates
        dual = chosen @ mean + c * np.linalg.norm(mean) * np.linalg.norm(chosen)
        gap = (dual - (updates @ direction(updates, c, 0, p)).min()) / (mean @ mean)
        assert 0 <= solution.gap <= 1e-13
        assert gap == pytest.approx(solution.gap, abs=1e-12)
        assert gap >= -1e-12  # no direction in the ball does better
        assert solution.weights.sum() == pytest.approx(1, abs=1e-12)
        assert (solution.weights >= 0).all()

    def test_without_radius_the_coefficients_are_the_preferences(self, seed: int) -> None:
        updates, p, _ = instance(seed)
        assert solved(updates, 0.0, p).coefficients.tolist() == (p / p.sum()).tolist()

    def test_the_scale_of_the_preferences_is_irrelevant(self, seed: int) -> None:
        updates, p, c = instance(seed)
        np.testing.assert_allclose(solved(updates, c, 64 * p).coefficients, solved(updates, c, p).coefficients)

    def test_a_zero_update_is_dropped(self, seed: int) -> None:
        updates, p, c = instance(seed)
        more = np.insert(updates, 1, 0.0, axis=0)
        shares = np.insert(p * 0.8, 1, 0.2)
        solution = solved(more, c, shares)
        assert solution.dropped == (1,)
        assert solution.weights[1] == solution.coefficients[1] == 0
        assert_same_direction(solution.coefficients @ more, direction(updates, c, 0, p), updates)


@pytest.mark.parametrize("seed", range(60))
def test_the_solver_is_as_good_as_slsqp(seed: int) -> None:
    random = np.random.default_rng(1000 + seed)
    num_sites, size = int(random.integers(2, 33)), int(random.integers(1, 200))
    updates = random.standard_normal((num_sites, size)) * random.lognormal(0, random.choice([0, 0.5, 1.5]))
    updates += random.choice([0, 0.3]) * random.standard_normal(size)
    p, c = random.dirichlet(np.ones(num_sites)), float(random.uniform(0.05, 0.95))
    a = updates @ updates.T
    a /= np.diagonal(a).mean()
    k = c * math.sqrt(p @ a @ p)

    def dual(w: np.ndarray) -> float:
        return float(w @ a @ p + k * math.sqrt(w @ a @ w))

    found = minimize(
        dual,
        p,
        jac=lambda w: a @ p + k * a @ w / math.sqrt(w @ a @ w),
        bounds=[(0, 1)] * num_sites,
        constraints={"type": "eq", "fun": lambda w: 1 - w.sum(), "jac": lambda w: -np.ones(num_sites)},
        method="SLSQP",
        options={"ftol": 1e-15, "maxiter": 1000},
    )
    theirs = np.clip(found.x, 0, None)
    theirs /= theirs.sum()
    solution = solve(a, p, c)
    assert solution.gap <= 1e-13  # nobody is better than by this
    assert dual(solution.weights) <= dual(theirs) + 1e-12 * abs(dual(theirs))


class TestSolver:
    @pytest.mark.parametrize("mode", [0, 1, 2])
    def test_upstream_s_gain_for_one_site(self, mode: Mode) -> None:
        coefficients = rescale(solve([[25.0]], [1.0], 0.4).coefficients, 0.4, mode)
        assert coefficients.tolist() == pytest.approx([(1.4, 1.2068965517, 1.0)[mode]], abs=1e-10)

    def test_one_site_in_mode_2_gets_its_update_back(self) -> None:
        updates = named([(3, 4)])
        solution = solve(gram_of(updates).matrix(), [5], 0.4)
        assert combine(updates, rescale(solution.coefficients, 0.4, 2))["w"].tolist() == [3, 4]

    def test_only_zero_updates_give_zero(self) -> None:
        solution = solve(np.zeros((2, 2)), [1, 3], 0.4)
        assert solution.coefficients.tolist() == [0.25, 0.75]
        assert solution.dropped == (0, 1)

    def test_a_block_of_zeros_keeps_its_share_of_the_mean(self) -> None:
        rows = np.array([(1, 0), (0, 0), (-0.8, 0.6)])
        solution = solve(rows @ rows.T, [0.25, 0.5, 0.25], 0.4, count_dropped=True)
        assert solution.dropped == (1,)
        assert (solution.coefficients @ rows).tolist() == pytest.approx([0.07, 0.21], abs=1e-12)  # half of O6
        assert solve(rows @ rows.T, [1, 2, 1], 0.0, count_dropped=True).coefficients.tolist() == [0.25, 0, 0.25]

    def test_a_vanishing_update_is_dropped_and_a_small_one_is_not(self) -> None:
        assert solved([(1, 0), (0, 1e-13)], 0.4).dropped == (1,)
        assert solved([(1, 0), (0, 1e-11)], 0.4).dropped == ()

    def test_unit_measures_gain_along_each_update(self) -> None:
        rows = np.array([(2.0, 0.0), (0.0, 1.0)])
        solution = solve(rows @ rows.T, [0.5, 0.5], 0.5, "unit")
        d = solution.coefficients @ rows
        assert solution.weights.tolist() == pytest.approx([0.0918, 0.9082], abs=1e-4)
        assert d.tolist() == pytest.approx([1.0562, 1.0562], abs=1e-4)
        assert (rows @ d / [2, 1])[0] == pytest.approx((rows @ d / [2, 1])[1], abs=1e-9)

    def test_unit_does_not_save_a_short_opposed_update(self) -> None:
        rows = np.array([(10, 0), (-0.1, 0.1)])
        assert solve(rows @ rows.T, [0.5, 0.5], 0.4, "unit").weights.tolist() == [0, 1]

    def test_equalise_first_gives_all_the_median_length(self) -> None:
        rows = np.array([(4.0, 0.0), (0.0, 1.0), (-0.6, 0.8)])
        same_length = rows * np.array([[0.25], [1], [1]])  # lengths 4, 1, 1
        d = solve(rows @ rows.T, [0.5, 0.3, 0.2], 0.4, "equalise").coefficients @ rows
        np.testing.assert_allclose(d, direction(same_length, 0.4, 0, (0.5, 0.3, 0.2)), rtol=1e-9)

    @pytest.mark.parametrize("normalisation", ["none", "unit", "equalise"])
    def test_equal_lengths_need_no_normalisation(self, normalisation: str) -> None:
        rows = np.array([(1, 0, 0), (-0.8, 0.6, 0), (0, 0.6, -0.8)])
        solution = solve(rows @ rows.T, [0.5, 0.3, 0.2], 0.4, normalisation)  # type: ignore[arg-type]
        np.testing.assert_allclose(
            solution.coefficients, solved(rows, 0.4, (0.5, 0.3, 0.2)).coefficients, rtol=1e-6, atol=1e-9
        )

    @pytest.mark.parametrize("radius", [-0.1, 1.0, 2.0, math.nan])
    def test_a_radius_outside_0_to_1_is_refused(self, radius: float) -> None:
        with pytest.raises(ParameterError, match=rf"radius must be in \[0, 1\), got {radius}"):
            solve(np.eye(2), [0.5, 0.5], radius)

    @pytest.mark.parametrize("preference", [(0.5, -0.1), (0, 0), (math.nan, 1), (math.inf, 1)])
    def test_preferences_that_are_none_are_refused(self, preference: tuple[float, float]) -> None:
        with pytest.raises(ParameterError, match="preferences must be ≥ 0 and not all 0"):
            solve(np.eye(2), preference, 0.4)

    def test_preferences_for_zero_updates_only_are_refused(self) -> None:
        with pytest.raises(ParameterError, match="leave out every update that is not 0"):
            solve([[0, 0], [0, 1]], [1, 0], 0.4)

    @pytest.mark.parametrize("gram", [np.eye(3), np.ones(2), np.ones((2, 3))])
    def test_a_gram_of_another_shape_is_refused(self, gram: np.ndarray) -> None:
        with pytest.raises(ParameterError, match="do not fit"):
            solve(gram, [0.5, 0.5], 0.4)

    @pytest.mark.parametrize("gram", [np.diag([1, math.nan]), np.diag([1.0, -1.0])])
    def test_what_is_no_gram_is_refused(self, gram: np.ndarray) -> None:
        with pytest.raises(ParameterError, match="not finite, or negative squares"):
            solve(gram, [0.5, 0.5], 0.4)

    def test_unknown_options_are_refused(self) -> None:
        with pytest.raises(ParameterError, match="none, unit or equalise, got 'cosine'"):
            solve(np.eye(2), [0.5, 0.5], 0.4, "cosine")  # type: ignore[arg-type]
        with pytest.raises(ParameterError, match="rescale must be 0, 1 or 2, got 3"):
            rescale(np.ones(2), 0.4, 3)  # type: ignore[arg-type]


class TestStreaming:
    @pytest.mark.parametrize("chunk", [1, 7, 45, 2**16])
    def test_the_streamed_gram_is_the_dense_one(self, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(conflict_averse, "_CHUNK", chunk)
        updates = mixed_updates()
        gram = gram_of(updates)
        assert gram.sites == ("a", "b", "c")
        np.testing.assert_allclose(gram.matrix(), dense(updates, ["conv", "bias", "scalar"]), rtol=1e-5, atol=1e-5)
        for name in ("conv", "bias", "scalar"):
            np.testing.assert_allclose(gram.matrix([name]), dense(updates, [name]), rtol=1e-5, atol=1e-5)
        assert not gram.matrix(["empty"]).any()

    @pytest.mark.parametrize(
        ("dtype", "tolerance"),
        [(torch.float16, 1e-13), (torch.bfloat16, 1e-13), (torch.float32, 1e-6), (torch.float64, 1e-13)],
    )
    def test_every_type_of_float_is_read_as_it_is(self, dtype: torch.dtype, tolerance: float) -> None:
        generator = torch.Generator().manual_seed(5)
        size = 2**16 + 13
        updates = {s: {"w": (100 * torch.randn(size, generator=generator)).to(dtype)} for s in "ab"}
        expected = dense(updates, ["w"])
        # Products of float16 squares overflow in float16: 300^2 > 65504.
        error = np.abs(gram_of(updates).matrix() - expected) / expected[0, 0]
        assert error.max() < tolerance
        combined = combine(updates, [0.25, 2.0])["w"]
        assert combined.dtype == torch.float32
        assert torch.equal(combined, (0.25 * updates["a"]["w"].double() + 2.0 * updates["b"]["w"].double()).float())

    def test_sums_over_chunks_run_in_float64(self, monkeypatch: pytest.MonkeyPatch) -> None:
        # In float32 1e8 + 1 is 1e8.
        monkeypatch.setattr(conflict_averse, "_CHUNK", 1)
        assert gram_of(named([(1e4, 1, 1)])).matrix().tolist() == [[1e8 + 2]]
        assert combine(named([(1e8,), (1,), (1,), (-1e8,)]), np.ones(4))["w"].tolist() == [2.0]

    def test_the_order_of_arrival_changes_no_bit(self) -> None:
        updates = mixed_updates()
        coefficients = [0.2, 0.3, 0.5]
        orders = [dict(order) for order in itertools.permutations(updates.items())]
        grams = [gram_of(order).matrix() for order in orders]
        sums = [combine(order, coefficients) for order in orders]
        assert all(np.array_equal(gram, grams[0]) for gram in grams)
        assert all(torch.equal(combined[name], sums[0][name]) for combined in sums for name in sums[0])

    @pytest.mark.parametrize("names", [None, ["conv"]])
    def test_a_site_after_the_first_matrix_changes_no_bit_either(self, names: list[str] | None) -> None:
        updates = mixed_updates()
        late, expected = GramMatrix(), gram_of(updates).matrix()
        for site, update in updates.items():
            late.add(site, update)
            late.matrix(names)
        assert np.array_equal(late.matrix(), expected)

    def test_each_product_is_taken_once(self) -> None:
        updates = named([(1, 2), (3, 4)])
        gram = gram_of(updates)
        assert gram.matrix().tolist() == [[5, 11], [11, 25]]
        for update in updates.values():
            update["w"].zero_()
        gram.add("c", {"w": torch.tensor([1.0, 1.0])})
        assert gram.matrix().tolist() == [[5, 11, 0], [11, 25, 0], [0, 0, 2]]

    @pytest.mark.parametrize("chunk", [7, 2**16])
    def test_without_radius_the_sum_is_fedavg_s_mean(self, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(conflict_averse, "_CHUNK", chunk)
        updates = mixed_updates()
        cases = {"a": 3, "b": 5, "c": 8}
        solution = solve(gram_of(updates).matrix(), list(cases.values()), 0.0)
        mean = weighted_mean({s: Update(u, 1, 1) for s, u in updates.items()}, {s: float(n) for s, n in cases.items()})
        combined = combine(updates, solution.coefficients)
        assert combined.keys() == mean.keys()
        assert all(torch.equal(combined[name], mean[name]) for name in mean)

    @pytest.mark.parametrize("scale", [1.0, 1e-2, 1e-6])
    def test_tiny_float32_updates_are_combined_as_well_as_large_ones(self, scale: float) -> None:
        updates = named([(2 * scale, 0), (0, scale)])
        d = combine(updates, solve(gram_of(updates).matrix(), [0.5, 0.5], 0.5).coefficients)["w"] / scale
        assert d.tolist() == pytest.approx([1, 1.0590169944], rel=1e-6)  # O4; upstream gives (1.5, 0.75) at 1e-2

    def test_updates_mapped_from_files_are_read_where_they_are(self, tmp_path: Path) -> None:
        generator = torch.Generator().manual_seed(9)
        plain = {s: {n: torch.randn(70_001, generator=generator) for n in ("v", "w")} for s in ("a", "b")}
        mapped = {}
        for site, update in plain.items():
            save_file(update, tmp_path / site)
            with safe_open(tmp_path / site, framework="pt") as file:
                mapped[site] = {name: file.get_tensor(name) for name in update}
        np.testing.assert_array_equal(gram_of(mapped).matrix(), gram_of(plain).matrix())
        combined, expected = combine(mapped, [0.5, -2]), combine(plain, [0.5, -2])
        assert all(torch.equal(combined[name], expected[name]) for name in expected)

    def test_strided_tensors_are_read_in_their_own_order(self) -> None:
        base = torch.arange(6.0).reshape(2, 3)
        updates = {"a": {"w": base.T}, "b": {"w": torch.tensor([[1.0, 0], [0, 0], [0, 10]])}}
        assert gram_of(updates).matrix().tolist() == [[55, 50], [50, 101]]  # 0 * 1 + 5 * 10
        assert combine(updates, [1, 1])["w"].tolist() == [[1, 3], [1, 4], [2, 15]]

    def test_coefficients_of_zero_give_zero(self) -> None:
        assert combine(named([(1, 2), (3, 4)]), [0, 0])["w"].tolist() == [0, 0]

    def test_inputs_stay_as_they_are(self) -> None:
        updates = named([(1, 2), (3, 4)])
        gram = gram_of(updates)
        gram.matrix()[0, 0] = 99
        combine(updates, [1, 1])["w"].zero_()
        assert gram.matrix().tolist() == [[5, 11], [11, 25]]
        assert [update["w"].tolist() for update in updates.values()] == [[1, 2], [3, 4]]


class TestRefusals:
    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    def test_values_that_are_not_finite_are_refused_by_name(self, value: float) -> None:
        gram = gram_of({"a": {"v": torch.ones(2), "w": torch.ones(2)}})
        with pytest.raises(ParameterError, match=r"update of 'b': 1 tensors are not finite: \[w\]"):
            gram.add("b", {"v": torch.ones(2), "w": torch.tensor([1.0, value])})
        assert gram.sites == ("a",)
        assert gram.matrix().tolist() == [[4]]

    def test_values_whose_squares_overflow_are_refused(self) -> None:
        with pytest.raises(ParameterError, match=r"update of 'a': values too large.*\['w'\]"):
            gram_of({"a": {"v": torch.ones(1), "w": torch.tensor([1e30])}})

    def test_integers_are_refused(self) -> None:
        with pytest.raises(ParameterError, match=r"not floating point: \[w torch\.int64\]"):
            gram_of({"a": {"w": torch.ones(2, dtype=torch.int64)}})

    def test_other_names_or_shapes_than_the_first_s_are_refused(self) -> None:
        gram = gram_of(named([(1, 2)]))
        with pytest.raises(ParameterError, match=r"update of 'b': 1 parameters missing \[w\], 1 unknown \[v\]"):
            gram.add("b", {"v": torch.ones(2)})
        with pytest.raises(ParameterError, match=r"w \(1,\) instead of \(2,\)"):
            gram.add("b", {"w": torch.ones(1)})

    def test_a_site_counts_once_and_not_without_tensors(self) -> None:
        gram = gram_of(named([(1, 2)]))
        with pytest.raises(ParameterError, match="'a': is already in"):
            gram.add("a", {"w": torch.ones(2)})
        with pytest.raises(ParameterError, match="'b': holds no tensors"):
            gram.add("b", {})

    def test_there_is_no_gram_of_nothing(self) -> None:
        with pytest.raises(ParameterError, match="no update yet"):
            GramMatrix().matrix()
        with pytest.raises(ParameterError, match=r"no such tensors: \['v'\]"):
            gram_of(named([(1, 2)])).matrix(["v"])

    def test_coefficients_must_fit_the_updates(self) -> None:
        updates = named([(1, 2), (3, 4)])
        with pytest.raises(ParameterError, match=r"\(1,\) coefficients for the updates of \['a', 'b'\]"):
            combine(updates, [1.0])
        with pytest.raises(ParameterError, match="coefficients for the updates of"):
            combine({}, [])
        with pytest.raises(ParameterError, match=r"combine: no such tensors: \['v'\]"):
            combine(updates, [1, 1], ["v"])
        with pytest.raises(ParameterError, match=r"update of 'b': .*w \(1,\) instead of \(2,\)"):
            combine({**updates, "b": {"w": torch.ones(1)}}, [1, 1])


class TestAgreement:
    @pytest.mark.parametrize(
        ("rows", "expected"),
        [
            ([(3, 4), (3, 4), (3, 4)], (1, 1, 1)),
            ([(1, 0), (-2, 0)], (0, 0)),
            ([(1, 0), (0, 5)], (0.5, 0.5)),
            ([(1, 0), (-0.5, 1)], (0.2763932, 0.2763932)),  # O5
            (TestOracles.O14, (0.28786797, 0.25790899, 0.08353663, 0.2058258)),
            ([(1, 0), (0, 0), (2, 0)], (1, 0.5, 1)),  # nothing to compare with
            ([(1, 0), (1, 0), (-1, 0)], (0.5, 0.5, 0)),  # the others of the first two cancel
            ([(7, 1)], (1,)),
        ],
    )
    def test_known_agreements(self, rows: Rows, expected: tuple[float, ...]) -> None:
        updates = np.array(rows, dtype=np.float64)
        agreement = leave_one_out_agreement(updates @ updates.T, np.ones(len(rows)))
        assert agreement.tolist() == pytest.approx(expected, abs=1e-8)

    def test_the_others_count_by_their_preference(self) -> None:
        updates = np.array([(1, 0), (3, 0), (0, 1)])
        # Others of the first: 0.5 * (3, 0) + 1.5 * (0, 1), and cos 45° is 0.7071067812.
        agreement = leave_one_out_agreement(updates @ updates.T, [1, 0.5, 1.5])
        assert agreement[0] == pytest.approx((1 + 0.7071067812) / 2, abs=1e-10)

    def test_rounding_never_leaves_0_to_1(self) -> None:
        agreement = leave_one_out_agreement([[1, 1 + 1e-9], [1 + 1e-9, 1]], [0.5, 0.5])
        assert agreement.tolist() == [1, 1]


class TestLikelihood:
    @pytest.mark.parametrize(
        ("x", "delta", "expected"),
        [
            (0.5, 0.5, 0.6534264097),
            (0, 0, 0.9999925922),
            (1, 0, -5.9077483712),
            (0.9, 0.1, -0.0414313176),
            (0.1, 0.1, 0.8374585133),
            (-3, -0.2, 0.9999925922),
        ],
    )
    def test_upstream_s_numbers(self, x: float, delta: float, expected: float) -> None:
        assert bernoulli_similarity(x, delta) == pytest.approx(expected, abs=1e-9)

    def test_it_is_a_mean(self) -> None:
        assert bernoulli_similarity([0.5, 0.1], [0.5, 0.1]) == pytest.approx(
            (0.6534264097 + 0.8374585133) / 2, abs=1e-9
        )

    @pytest.mark.parametrize("x", [0.0, 0.1, 0.5, 1.0])
    def test_exact_is_1_only_at_equality(self, x: float) -> None:
        assert bernoulli_similarity(x, x, "exact") == pytest.approx(1, abs=1e-12)
        assert bernoulli_similarity(x, 0.3, "exact") < 0.999

    def test_exact_spans_0_to_1(self) -> None:
        assert bernoulli_similarity(1, 0, "exact") == pytest.approx(0, abs=1e-12)
        # KL(0.9 ‖ 0.1) = 0.8 ln 9 = 1.7577796619, KL_max = (1 - 2e-6) ln 999999 = 13.8154819270
        assert bernoulli_similarity(0.9, 0.1, "exact") == pytest.approx(1 - 1.7577796619 / 13.8154819270, abs=1e-9)

    def test_what_has_no_meaning_is_refused(self) -> None:
        with pytest.raises(ParameterError, match=r"probabilities in \[0, 1\]"):
            bernoulli_similarity(-0.2, 0.5, "exact")
        with pytest.raises(ParameterError, match=r"shapes \(2,\) and \(\)"):
            bernoulli_similarity([0.1, 0.2], 0.5)
        with pytest.raises(ParameterError, match="upstream or exact, got 'none'"):
            bernoulli_similarity(0.5, 0.5, "none")  # type: ignore[arg-type]
