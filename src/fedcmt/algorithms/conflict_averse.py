"""Conflict-averse aggregation: the direction near the mean update that most helps the site it helps least.

    max_d min_i <Δ_i, d>  subject to  ‖d − g0‖ ≤ c ‖g0‖,  g0 = Σ p_i Δ_i,  0 ≤ c < 1

Liu et al., Conflict-Averse Gradient Descent for Multi-task Learning (CAGrad, Algorithm 1), NeurIPS 2021,
https://arxiv.org/abs/2110.14048, over weight differences as in FedHCA2's Hyper Conflict-Averse Aggregation, Lu et al.,
CVPR 2024, https://arxiv.org/abs/2311.13250, and with preferences p in place of 1/N. The direction is a weighted sum of
the updates, and its weights need only their inner products. So each update is read three times and never held: to be
checked (`GramMatrix.add`), beside all others (`GramMatrix.matrix`), and once more for the sum (`combine`).
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from fedcmt.params import ParameterError, Params, check_finite, check_shapes, shapes

Normalisation = Literal["none", "unit", "equalise"]

_CHUNK = 2**15
"""Elements; the chunks of all updates share the processor's cache, and torch reads each without starting threads."""
_MAX_ITERATIONS = 2000
_GAP_TOLERANCE = 1e-13
_NEGLIGIBLE = 1e-24
"""Squared norm of an update as a fraction of the largest."""
_ZERO_MEAN = 1e-12
_SMOOTHING = 1e-9
_STATIONARY = 1e-6
_CLAMP = 1e-6


class GramMatrix:
    """Inner products of the sites' updates, each tensor's apart.

    Products of float32 updates run in float32 per chunk, all others in float64; chunks are summed in float64. An update
    is held by reference and read chunk by chunk, so one mapped from a file stays there; it must stay as it is until
    `matrix` has been called. Nothing depends on the order of arrival.
    """

    def __init__(self) -> None:
        self._updates: dict[str, Mapping[str, Tensor]] = {}
        self._products: dict[str, dict[tuple[str, str], float]] = {}
        """By tensor and by pair of sites in the order of their names."""

    @property
    def sites(self) -> tuple[str, ...]:
        """The sites so far, sorted: the order of `matrix`."""
        return tuple(sorted(self._updates))

    def add(self, site: str, update: Mapping[str, Tensor]) -> None:
        """Take in one site's update, checking it in the pass that squares it.

        Args:
          site: Its name, new to this matrix.
          update: Finite floating-point tensors; the same names and shapes from every site.

        Raises:
          ParameterError: If the site is already in, its update is empty or has other tensors than the others', or a
            value is not finite (naming the tensors). The matrix is as before then.
        """
        where = f"update of {site!r}"
        if site in self._updates:
            raise ParameterError(f"{where}: is already in the Gram matrix")
        if not update:
            raise ParameterError(f"{where}: holds no tensors")
        if self._updates:
            check_shapes(update, shapes(next(iter(self._updates.values()))), where=where)
        check_finite({name: t for name, t in update.items() if not t.is_floating_point()}, where=where)
        squares = {name: _inner_products([tensor], [(0, 0)])[0] for name, tensor in update.items()}
        _check_squares(squares, update, where)
        self._updates[site] = update
        for name, square in squares.items():
            self._products.setdefault(name, {})[site, site] = square

    def drop(self, site: str) -> None:
        """Forget a site's update: it is in no matrix from now on."""
        del self._updates[site]
        for products in self._products.values():
            for pair in [pair for pair in products if site in pair]:
                del products[pair]

    def matrix(self, names: Collection[str] | None = None) -> np.ndarray:
        """The Gram matrix over all tensors, or over ``names`` only: a stage's, a single one's.

        Products that no call before has needed are taken in one pass over these tensors of all updates.

        Returns:
          float64 [N, N], symmetric, in the order of `sites`.

        Raises:
          ParameterError: If there is no update yet, or a name is in none.
        """
        if not self._updates:
            raise ParameterError("Gram matrix: no update yet")
        chosen = sorted(self._products if names is None else names)
        unknown = [name for name in chosen if name not in self._products]
        if unknown:
            raise ParameterError(f"Gram matrix: no such tensors: {unknown}")
        sites = self.sites
        rows, columns = np.triu_indices(len(sites))
        pairs = [(sites[i], sites[j]) for i, j in zip(rows, columns, strict=True)]
        upper = np.zeros(len(pairs))
        for name in chosen:
            self._complete(name)
            upper += [self._products[name][pair] for pair in pairs]
        full = np.zeros((len(sites), len(sites)))
        full[rows, columns] = full[columns, rows] = upper
        return full

    def _complete(self, name: str) -> None:
        """Take the products of one tensor that are still missing."""
        products, sites = self._products[name], self.sites
        missing = [(i, j) for i, j in combinations(range(len(sites)), 2) if (sites[i], sites[j]) not in products]
        values = _inner_products([self._updates[site][name] for site in sites], missing)
        products |= {(sites[i], sites[j]): value for (i, j), value in zip(missing, values, strict=True)}


@dataclass(frozen=True, eq=False)
class Solution:
    """How the updates combine, in the order of the Gram matrix.

    Attributes:
      coefficients: v [N], the factors of d = Σ v_i Δ_i before `rescale`.
      weights: w [N] on the simplex, the dual solution: which sites bound the worst case; 0 for dropped ones.
      gap: F(w) − min_i <Δ_i, d> ≥ 0, a certificate of how far d is from optimal, as a fraction of ‖g0‖²; under
        ``unit``, of <Δ_i/‖Δ_i‖, d> as a fraction of ‖g0‖.
      iterations: Exact line searches done.
      pareto_stationary: Whether 0 is a convex combination of the updates, so that no direction helps every site; d is
        then all but the mean.
      dropped: Indices of negligible updates; their v is 0. Where all updates are 0, all are listed and v and w are p.
    """

    coefficients: np.ndarray
    weights: np.ndarray
    gap: float
    iterations: int
    pareto_stationary: bool
    dropped: tuple[int, ...]


def solve(
    gram: ArrayLike,
    preference: ArrayLike,
    radius: float,
    normalisation: Normalisation = "none",
    *,
    count_dropped: bool = False,
) -> Solution:
    """Minimise wᵀAp + c ‖g0‖ √(wᵀAw) over the simplex (CAGrad, Algorithm 1) by exact pairwise line searches.

    Deterministic; ties go to the lowest index. Scaling all updates changes neither v nor w.

    Args:
      gram: A [N, N], inner products of the updates.
      preference: p [N], ≥ 0; its scale does not matter.
      radius: c in [0, 1); 0 is the mean.
      normalisation: ``none``; ``unit`` measures each site's gain along its update's direction, whatever its length;
        ``equalise`` first rescales every update to the median norm, the mean's share included.
      count_dropped: Whether a dropped update keeps its share of the mean. A whole update of zeros is a site's failure
        (False: the others' preferences are renormalised); a block of zeros is what the site sent for that block (True).

    Raises:
      ParameterError: If an argument is out of range, not finite, or of another shape.
    """
    gram, preference = _checked(gram, preference)
    if not 0 <= radius < 1:
        raise ParameterError(f"conflict-averse: radius must be in [0, 1), got {radius}")
    if normalisation not in ("none", "unit", "equalise"):
        raise ParameterError(f"conflict-averse: normalisation must be none, unit or equalise, got {normalisation!r}")
    dropped = tuple(int(i) for i in negligible(gram))
    kept = np.setdiff1d(np.arange(len(gram)), dropped)
    if not kept.size:  # every update is zero
        share = preference / preference.sum()
        return Solution(share, share, 0.0, 0, True, dropped)
    if not preference[kept].sum() > 0:
        raise ParameterError(f"conflict-averse: preferences {preference.tolist()} leave out every update that is not 0")
    share = preference[kept] / preference[kept].sum()
    inner = _solve_kept(gram[np.ix_(kept, kept)], share, radius, normalisation)
    coefficients, weights = np.zeros(len(gram)), np.zeros(len(gram))
    # The ball scales with the mean, so d scales with the preferences.
    counted = preference[kept].sum() / preference.sum() if count_dropped else 1.0
    coefficients[kept], weights[kept] = counted * inner.coefficients, inner.weights
    return Solution(coefficients, weights, inner.gap, inner.iterations, inner.pareto_stationary, dropped)


def negligible(gram: np.ndarray) -> np.ndarray:
    """Indices of updates that are zero beside the longest: they say nothing, yet would own the worst case."""
    squared = np.diagonal(gram)
    return np.flatnonzero(~(squared > _NEGLIGIBLE * squared.max()))


def rescale(coefficients: np.ndarray, radius: float, mode: Literal[0, 1, 2]) -> np.ndarray:
    """Undo the length that the ball adds: mode 0 not at all, 1 by 1/(1+c²) (CAGrad's code), 2 by 1/(1+c).

    Mode 2 leaves identical updates as they are, is never longer than the mean, and improves the worst site at least as
    much as the mean does: by Cauchy–Schwarz F(w) ≥ (1+c) wᵀAp.

    Raises:
      ParameterError: If the mode is another.
    """
    if mode not in (0, 1, 2):
        raise ParameterError(f"conflict-averse: rescale must be 0, 1 or 2, got {mode!r}")
    return coefficients / (1.0, 1 + radius**2, 1 + radius)[mode]


def combine(
    updates: Mapping[str, Mapping[str, Tensor]], coefficients: ArrayLike, names: Collection[str] | None = None
) -> Params:
    """Σ_i v_i Δ_i, chunk by chunk in float64 and in the order of site names.

    Args:
      updates: Site to its update; the same names and shapes from every site.
      coefficients: v [N], in the order of the sorted site names.
      names: Only these tensors, e.g. one stage's; None for all.

    Returns:
      float32 tensors.

    Raises:
      ParameterError: If there is no update, or names, shapes or the number of coefficients differ.
    """
    factors = np.asarray(coefficients, dtype=np.float64)
    sites = sorted(updates)
    if not sites or factors.shape != (len(sites),):
        raise ParameterError(f"combine: {factors.shape} coefficients for the updates of {sites}")
    expected = shapes(updates[sites[0]])
    for site in sites[1:]:
        check_shapes(updates[site], expected, where=f"combine: update of {site!r}")
    unknown = sorted(set(names or ()) - set(expected))
    if unknown:
        raise ParameterError(f"combine: no such tensors: {unknown}")
    used = [updates[site] for site, v in zip(sites, factors, strict=True) if v != 0]
    chosen = [name for name in expected if names is None or name in names]
    return {n: _weighted_sum(expected[n], [update[n] for update in used], factors[factors != 0]) for n in chosen}


def leave_one_out_agreement(gram: ArrayLike, preference: ArrayLike) -> np.ndarray:
    """How far each site's update points where the others' mean does.

    Args:
      gram: A [N, N], inner products of the updates.
      preference: p [N], ≥ 0; renormalised over the others.

    Returns:
      (1 + cos(Δ_i, Σ_{j≠i} p_j Δ_j)) / 2, [N] in [0, 1]: 1 is agreement, 0 opposition, 0.5 orthogonal or no direction
      to compare; 1 for a site alone.

    Raises:
      ParameterError: If an argument is out of range, not finite, or of another shape.
    """
    gram, preference = _checked(gram, preference)
    if len(gram) == 1:
        return np.ones(1)
    agreement = np.full(len(gram), 0.5)
    for i in range(len(gram)):
        others = preference.copy()
        others[i] = 0.0
        norms = np.sqrt(gram[i, i] * max(0.0, others @ gram @ others))
        if norms > 0:
            agreement[i] = (1 + np.clip(gram[i] @ others / norms, -1.0, 1.0)) / 2
    return agreement


def bernoulli_similarity(x: ArrayLike, delta: ArrayLike, normalise: Literal["upstream", "exact"] = "upstream") -> float:
    """Mean similarity of Bernoulli probabilities, clamped to [1e-6, 1 − 1e-6].

    ``upstream`` is 1 − BCE/2 as in FedCMT's released ``compute_likely_hood``: in [−5.91, 1), and not greatest at
    equality. ``exact`` is 1 − KL/KL_max in [0, 1], and 1 only for equal probabilities.

    Raises:
      ParameterError: If shapes differ, the normalisation is unknown, or ``exact`` is given what is no probability.
    """
    left, right = np.asarray(x, dtype=np.float64), np.asarray(delta, dtype=np.float64)
    if left.shape != right.shape or not left.size:
        raise ParameterError(f"bernoulli_similarity: shapes {left.shape} and {right.shape}")
    if normalise not in ("upstream", "exact"):
        raise ParameterError(f"bernoulli_similarity: normalise must be upstream or exact, got {normalise!r}")
    if normalise == "exact" and not all(bool(((a >= 0) & (a <= 1)).all()) for a in (left, right)):
        raise ParameterError("bernoulli_similarity: exact needs probabilities in [0, 1]")
    left, right = (np.clip(a, _CLAMP, 1 - _CLAMP) for a in (left, right))
    cross = _cross_entropy(left, right)
    if normalise == "upstream":
        return float(np.mean(1 - cross / 2))
    largest = (1 - 2 * _CLAMP) * np.log((1 - _CLAMP) / _CLAMP)
    return float(np.mean(1 - (cross - _cross_entropy(left, left)) / largest))


def _cross_entropy(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return -(x * np.log(y) + (1 - x) * np.log1p(-y))


def _chunks(num_elements: int) -> Iterator[slice]:
    for start in range(0, num_elements, _CHUNK):
        yield slice(start, min(start + _CHUNK, num_elements))


def _flat(tensor: Tensor) -> Tensor:
    """A 1-D view; tensors from the wire and from files are contiguous."""
    return tensor.detach().reshape(-1)


def _reader(tensor: Tensor) -> Callable[[slice], np.ndarray]:
    """Chunk by chunk, views of float32 and float64, and float64 copies of half precision.

    Sums of half-precision squares in float32 all round the same way: 3e-6 too small over a chunk of bfloat16.
    """
    flat = _flat(tensor)
    if flat.dtype in (torch.float32, torch.float64):
        return flat.numpy().__getitem__
    return lambda part: flat[part].double().numpy()


def _inner_products(tensors: list[Tensor], pairs: list[tuple[int, int]]) -> list[float]:
    """<tensors[i], tensors[j]> for each pair (i, j), in one pass."""
    readers = [_reader(tensor) for tensor in tensors]
    total = [0.0] * len(pairs)
    # Overflow is reported by tensor name afterwards.
    with np.errstate(over="ignore", invalid="ignore"):
        for part in _chunks(tensors[0].numel() if pairs else 0):
            chunks = [read(part) for read in readers]
            # One product per pair: packing eight sites' chunks for a matrix product takes as long as all of these.
            products = [float(np.dot(chunks[i], chunks[j])) for i, j in pairs]
            total = [before + product for before, product in zip(total, products, strict=True)]
    return total


def _check_squares(squares: Mapping[str, float], update: Mapping[str, Tensor], where: str) -> None:
    """A NaN or an infinity shows in a tensor's square, so finding it costs no further pass."""
    suspicious = [name for name, square in squares.items() if not np.isfinite(square)]
    check_finite({name: update[name] for name in suspicious}, where=where)
    if suspicious:
        raise ParameterError(f"{where}: values too large, inner products overflow: {suspicious}")


def _weighted_sum(shape: tuple[int, ...], tensors: list[Tensor], factors: np.ndarray) -> Tensor:
    out = torch.empty(shape, dtype=torch.float32)
    flat, readers = out.view(-1).numpy(), [_reader(tensor) for tensor in tensors]
    buffer = np.empty((len(readers), min(_CHUNK, flat.size)))
    for part in _chunks(flat.size):
        chunk = buffer[:, : part.stop - part.start]
        for row, read in zip(chunk, readers, strict=True):
            row[:] = read(part)
        # A BLAS product here starts threads for each chunk, and they wait for each other wherever cores are shared.
        flat[part] = np.einsum("i,ij->j", factors, chunk)
    return out


def _checked(gram: ArrayLike, preference: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Both as float64, the Gram matrix exactly symmetric."""
    a, p = np.asarray(gram, dtype=np.float64), np.asarray(preference, dtype=np.float64)
    if p.ndim != 1 or not p.size or a.shape != (p.size, p.size):
        raise ParameterError(f"conflict-averse: Gram matrix {a.shape} and preferences {p.shape} do not fit")
    if not np.isfinite(a).all() or (np.diagonal(a) < 0).any():
        raise ParameterError("conflict-averse: the Gram matrix has entries that are not finite, or negative squares")
    if not np.isfinite(p).all() or (p < 0).any() or not p.sum() > 0:
        raise ParameterError(f"conflict-averse: preferences must be ≥ 0 and not all 0, got {p.tolist()}")
    return (a + a.T) / 2, p


@dataclass(frozen=True)
class _Dual:
    """F(w) = wᵀ linear + k √(wᵀ quadratic w + smoothing²) on the simplex."""

    linear: np.ndarray
    quadratic: np.ndarray
    k: float
    smoothing: float

    def evaluate(self, w: np.ndarray) -> tuple[np.ndarray, float, np.ndarray]:
        """∇F(w) [N], the square root, and quadratic·w [N]."""
        qw = self.quadratic @ w
        root = float(np.sqrt(max(0.0, w @ qw) + self.smoothing**2))
        return self.linear + self.k * qw / root, root, qw

    def step(self, i: int, j: int, most: float, root: float, qw: np.ndarray) -> float:
        """The t in [0, most] that minimises F(w + t (e_i − e_j)), in closed form."""
        slope = self.linear[i] - self.linear[j]
        q1 = qw[i] - qw[j]
        diagonal = self.quadratic[i, i] + self.quadratic[j, j]
        q2 = diagonal - 2 * self.quadratic[i, j]
        if q2 <= 1e-15 * diagonal:  # the same update twice, up to rounding
            return most
        rest = max(0.0, root**2 - q1**2 / q2)
        curvature = self.k**2 * q2 - slope**2
        if curvature <= 0:  # F is monotone along the line
            return most if slope < 0 else 0.0
        best = -np.sign(slope) * np.sqrt(slope**2 * rest / (q2 * curvature)) - q1 / q2
        return float(np.clip(best, 0.0, most))


def _minimise(dual: _Dual, start: np.ndarray, tolerance: float) -> tuple[np.ndarray, float, int]:
    """Move weight from the best-off to the worst-off site until the gap closes.

    Returns:
      w [N], the gap F(w) − min_i ∇F(w)_i (F is homogeneous: wᵀ∇F = F), and the number of line searches.
    """
    w = start.copy()
    iterations = 0
    while True:
        gradient, root, qw = dual.evaluate(w)
        i = int(np.argmin(gradient))
        j = int(np.argmax(np.where(w > 0, gradient, -np.inf)))
        gap = max(0.0, float(w @ gradient - gradient[i]))
        if gap <= tolerance or iterations == _MAX_ITERATIONS:
            return w, gap, iterations
        t = dual.step(i, j, float(w[j]), root, qw)
        if t <= 0:  # the line search ends where it began: rounding allows no more
            return w, gap, iterations
        w[i] += t
        w[j] -= t
        iterations += 1


def _solve_kept(gram: np.ndarray, share: np.ndarray, radius: float, normalisation: Normalisation) -> Solution:
    """`solve` where no update is negligible and the preferences sum to 1."""
    norms = np.sqrt(np.diagonal(gram))
    stretch = np.median(norms) / norms if normalisation == "equalise" else np.ones(len(gram))
    a = gram * np.outer(stretch, stretch)
    a = a / np.diagonal(a).mean()  # from here on every tolerance is relative
    target = 1 / np.sqrt(np.diagonal(a)) if normalisation == "unit" else np.ones(len(gram))
    mean = float(np.sqrt(max(0.0, share @ a @ share)))
    if mean <= _ZERO_MEAN:  # no direction to stay close to
        return Solution(stretch * share, share, 0.0, 0, True, ())
    k = radius * mean
    dual = _Dual(target * (a @ share), a * np.outer(target, target), k, _SMOOTHING * mean)
    scale = mean if normalisation == "unit" else mean**2
    w, gap, iterations = _minimise(dual, share, _GAP_TOLERANCE * scale)
    length = float(np.sqrt(max(0.0, w @ dual.quadratic @ w)))
    stationary = length < _STATIONARY * mean
    if stationary:
        length = float(np.hypot(length, _STATIONARY * mean))
    coefficients = stretch * (share + k / length * target * w)
    return Solution(coefficients, w, gap / scale, iterations, stationary, ())
