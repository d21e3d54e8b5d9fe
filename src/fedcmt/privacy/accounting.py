"""What noise buys: epsilon of a sequence of Gaussian releases, and the noise a budget needs.

Every release adds N(0, (z S)^2) to a sum in which one protected unit (a site, a training case) has a part of 2-norm at
most S. Neighbours differ by one unit, which takes part or counts as zeros; where one unit may be replaced by another,
the same z protects as z / 2 does here. Computed by dp-accounting: "pld" by privacy loss distributions (tight), "rdp" by
Rényi divergences (an upper bound).

Dong, Roth and Su, Gaussian Differential Privacy, 2019, https://arxiv.org/abs/1905.02383; Mironov, Rényi Differential
Privacy, 2017, https://arxiv.org/abs/1702.07476; Bun and Steinke, Concentrated Differential Privacy, 2016,
https://arxiv.org/abs/1605.02065.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from dp_accounting import DpEvent, GaussianDpEvent, PoissonSampledDpEvent, PrivacyAccountant, SelfComposedDpEvent
from dp_accounting.pld import PLDAccountant
from dp_accounting.pld.privacy_loss_mechanism import GaussianPrivacyLoss
from dp_accounting.rdp import RdpAccountant
from scipy.optimize import brentq

from fedcmt.logs import silenced
from fedcmt.settings import is_int, is_number, require

Accountant = Literal["pld", "rdp"]
ACCOUNTANTS: tuple[Accountant, ...] = ("pld", "rdp")
MOST_ROUNDS = 10**6
"""Where `rounds_allowed` stops counting."""

_WHERE = "privacy accounting"
_TIGHT_UP_TO = 50.0
"""Epsilon from which sampled releases keep the RDP bound: a loss distribution needs memory in proportion to epsilon
(10 GB at 2,800), for a number that promises nothing."""
_PRECISION = 5e-5
LEAST_NOISE, MOST_NOISE = 1e-12, 1e15
"""What accountants can compute with."""

_LEAST_DELTA = 1e-100
_LARGEST_LOG_NOISE = 30.0


@dataclass(frozen=True)
class Release:
    """Noisy sums of the same kind.

    Attributes:
      noise_multiplier: z >= 1e-12, standard deviation of the noise on the sum in units of the clipping bound.
      sampling_rate: Probability in (0, 1] with which each unit takes part, drawn independently (Poisson) and secretly
        for each sum; 1 for all units.
      count: Number of sums, >= 1.
    """

    noise_multiplier: float
    sampling_rate: float = 1.0
    count: int = 1

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
          ValueError: Naming the value, what came and what was expected.
        """
        z, rate = self.noise_multiplier, self.sampling_rate
        in_range = is_number(z) and LEAST_NOISE <= z <= MOST_NOISE
        require(in_range, _WHERE, "noise_multiplier", z, f"a number from {LEAST_NOISE:g} to {MOST_NOISE:g}")
        require(is_number(rate) and 0 < rate <= 1, _WHERE, "sampling_rate", rate, "in (0, 1]")
        _require_count("count", self.count)


def epsilon(releases: Sequence[Release], delta: float, accountant: Accountant = "pld") -> float:
    """Epsilon of all releases together, in any order; 0 of none.

    With "pld" and no sampling the value is exact. With sampling it is a tight upper bound up to an epsilon of 50, and
    that of "rdp" beyond. Values are remembered, so asking again is cheap.

    Args:
      releases: All that one unit takes part in.
      delta: In (0, 1); below 1 / (number of units), or it promises nothing.
      accountant: "pld" or "rdp".

    Raises:
      ValueError: Naming the argument.
    """
    require_delta(_WHERE, delta)
    require(accountant in ACCOUNTANTS, _WHERE, "accountant", accountant, " or ".join(ACCOUNTANTS))
    counts: Counter[tuple[float, float]] = Counter()
    for release in releases:
        counts[float(release.noise_multiplier), float(release.sampling_rate)] += release.count
    return _epsilon(tuple(sorted((z, rate, count) for (z, rate), count in counts.items())), delta, accountant)


def noise_multiplier_for(
    target_epsilon: float, delta: float, count: int, sampling_rate: float = 1.0, accountant: Accountant = "pld"
) -> float:
    """The least noise multiplier with which ``count`` releases stay within an epsilon, rounded up by 0.01 % at most.

    Raises:
      ValueError: Naming the argument, or if no noise is enough for this accountant.
    """
    _require_positive("target_epsilon", target_epsilon)

    def excess(log_noise: float) -> float:
        return epsilon([Release(math.exp(log_noise), sampling_rate, count)], delta, accountant) - target_epsilon

    high = 0.0
    while excess(high) > 0:
        high += 1.0
        if high > _LARGEST_LOG_NOISE:
            raise ValueError(
                f"{_WHERE}: accountant {accountant!r} finds no noise for target_epsilon {target_epsilon!r} at delta "
                f"{delta!r}; ask for a larger one"
            )
    low = high - 1.0
    while excess(low) <= 0:
        low, high = low - 1.0, low
    log_noise = float(brentq(excess, low, high, xtol=_PRECISION))
    while excess(log_noise) > 0:
        log_noise += _PRECISION
    return math.exp(log_noise)


def rounds_allowed(
    target_epsilon: float,
    delta: float,
    noise_multiplier: float,
    steps: int = 1,
    sampling_rate: float = 1.0,
    accountant: Accountant = "pld",
) -> int:
    """The most rounds, of ``steps`` releases each, that stay within an epsilon; `MOST_ROUNDS` for that many or more.

    Raises:
      ValueError: Naming the argument.
    """
    _require_positive("target_epsilon", target_epsilon)
    _require_count("steps", steps)

    def within(rounds: int, by: Accountant) -> bool:
        return epsilon([Release(noise_multiplier, sampling_rate, rounds * steps)], delta, by) <= target_epsilon

    # RDP's answer costs next to nothing and is a little too small, so it is where the tight search begins.
    known = _last(lambda rounds: within(rounds, "rdp"), 0)
    return known if accountant == "rdp" else _last(lambda rounds: within(rounds, "pld"), known)


def published_noise_multiplier(sigma: float, clip: float, sites: int) -> float:
    """z = sigma K / S of noise with standard deviation sigma on the mean of K updates of norm at most S."""
    _require_positive("sigma", sigma)
    _require_positive("clip", clip)
    _require_count("sites", sites)
    return sigma * sites / clip


def noise_std_on_mean(noise_multiplier: float, clip: float, sites: int) -> float:
    """z S / K: standard deviation of the noise on each weight of the mean of K updates of norm at most S."""
    _require_positive("noise_multiplier", noise_multiplier)
    _require_positive("clip", clip)
    _require_count("sites", sites)
    return noise_multiplier * clip / sites


def zcdp_rho(noise_multiplier: float, count: int) -> float:
    """rho = T / (2 z^2) of zero-concentrated differential privacy, for T releases without sampling."""
    _require_positive("noise_multiplier", noise_multiplier)
    _require_count("count", count)
    return count / (2 * noise_multiplier**2)


@lru_cache(maxsize=4096)
def _epsilon(counts: tuple[tuple[float, float, int], ...], delta: float, accountant: Accountant) -> float:
    """`epsilon` of (noise multiplier, sampling rate, count), each pair of the first two once."""
    if not counts:
        return 0.0
    if accountant == "pld" and all(rate == 1 for _, rate, _ in counts):
        return _gaussian_epsilon(math.sqrt(sum(count / z**2 for z, _, count in counts)), delta)
    bound = _composed(RdpAccountant(), counts, delta)
    return bound if accountant == "rdp" or bound > _TIGHT_UP_TO else _composed(PLDAccountant(), counts, delta)


def _composed(accountant: PrivacyAccountant, counts: Sequence[tuple[float, float, int]], delta: float) -> float:
    with silenced("absl"):  # warns of each Rényi order that it leaves out, which makes the bound larger, never wrong
        for z, rate, count in counts:
            event: DpEvent = GaussianDpEvent(z)
            if rate < 1:
                event = PoissonSampledDpEvent(rate, event)
            accountant.compose(SelfComposedDpEvent(event, count))
        return float(accountant.get_epsilon(delta))


def _gaussian_epsilon(mu: float, delta: float) -> float:
    """Epsilon of mu-Gaussian differential privacy: Gaussian releases without sampling compose to one of 1 / mu."""
    loss = GaussianPrivacyLoss(standard_deviation=1 / mu)

    def excess(value: float) -> float:
        with np.errstate(over="ignore"):  # far above the value that is sought
            return max(float(loss.get_delta_for_epsilon(value)), -1.0) - delta

    rho = mu**2 / 2
    bound = rho + 2 * math.sqrt(rho * math.log(1 / delta))  # zCDP's, never below the exact value
    if excess(0.0) <= 0:
        return 0.0
    if excess(bound) >= 0:  # so large that float64 cannot tell them apart
        return bound
    return float(brentq(excess, 0.0, bound))


def _last(holds: Callable[[int], bool], known: int) -> int:
    """The largest number up to `MOST_ROUNDS` for which ``holds`` is true, if it is of all below; 0 if of none.

    Args:
      holds: True up to the number that is sought.
      known: A guess from below, where the search begins.
    """
    low, step = (known if known and holds(known) else 0), max(1, known // 16)
    while (high := min(low + step, MOST_ROUNDS + 1)) <= MOST_ROUNDS and holds(high):
        low, step = high, 2 * step
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def require_delta(where: str, delta: object) -> None:
    """Raise ValueError, naming ``where``, unless it is a delta that accountants can compute with."""
    ok = is_number(delta) and _LEAST_DELTA <= delta < 1
    require(ok, where, "delta", delta, f"from {_LEAST_DELTA:g}, below 1")


def _require_positive(key: str, value: object) -> None:
    require(is_number(value) and value > 0, _WHERE, key, value, "a number above 0")


def _require_count(key: str, value: object) -> None:
    require(is_int(value) and value >= 1, _WHERE, key, value, "a whole number from 1")
