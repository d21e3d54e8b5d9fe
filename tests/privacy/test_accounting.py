"""Epsilon of known mechanisms, against published and closed forms."""

import logging
import math

import pytest
from dp_accounting import GaussianDpEvent, SelfComposedDpEvent
from dp_accounting.pld import PLDAccountant
from scipy.stats import norm

from fedcmt.privacy import accounting
from fedcmt.privacy.accounting import (
    MOST_ROUNDS,
    Accountant,
    Release,
    epsilon,
    noise_multiplier_for,
    noise_std_on_mean,
    published_noise_multiplier,
    rounds_allowed,
    zcdp_rho,
)

DELTA = 1e-5
RDP: Accountant = "rdp"


@pytest.mark.parametrize(
    ("z", "zcdp", "rdp", "pld"),
    [
        (1, 58.93, 57.30, 54.38),
        (2, 23.22, 22.02, 20.68),
        (4, 10.05, 9.23, 8.60),
        (8, 4.63, 4.11, 3.80),
        (16, 2.22, 1.89, 1.74),
    ],
)
def test_t7_fifty_rounds_by_three_accountants(z: float, zcdp: float, rdp: float, pld: float) -> None:
    rho = zcdp_rho(z, 50)
    assert rho + 2 * math.sqrt(rho * math.log(1 / DELTA)) == pytest.approx(zcdp, abs=0.01)
    assert epsilon([Release(z, count=50)], DELTA, "rdp") == pytest.approx(rdp, abs=0.01)
    assert epsilon([Release(z, count=50)], DELTA, "pld") == pytest.approx(pld, abs=0.01)


@pytest.mark.parametrize(
    ("count", "target", "z"),
    [
        (1, 1, 3.731),
        (1, 8, 0.600),
        (25, 1, 18.653),
        (25, 8, 3.001),
        (50, 1, 26.380),
        (50, 2, 14.098),
        (50, 4, 7.645),
        (50, 8, 4.244),
        (50, 10, 3.535),
        (100, 8, 6.002),
    ],
)
def test_t7_the_noise_an_epsilon_needs(count: int, target: float, z: float) -> None:
    found = noise_multiplier_for(target, DELTA, count)
    assert found == pytest.approx(z, rel=1e-4, abs=5e-4)
    assert epsilon([Release(found, count=count)], DELTA) <= target
    assert epsilon([Release(found * (1 - 1e-3), count=count)], DELTA) > target


def test_t7_epsilon_grows_with_rounds_and_falls_with_noise() -> None:
    for accountant in accounting.ACCOUNTANTS:
        by_rounds = [epsilon([Release(4, count=n)], DELTA, accountant) for n in (1, 2, 10, 50, 51)]
        by_noise = [epsilon([Release(z, count=50)], DELTA, accountant) for z in (16, 8, 4, 2.5)]
        assert by_rounds == sorted(set(by_rounds))
        assert by_noise == sorted(set(by_noise))


@pytest.mark.parametrize(
    ("batch", "steps", "z", "rdp", "pld"),
    [(2, 12_500, 1, 4.40, 3.89), (8, 2_500, 1, 9.23, 8.17), (8, 2_500, 2, 2.96, 2.61)],
)
def test_t7_steps_of_a_site_with_250_cases(batch: int, steps: int, z: float, rdp: float, pld: float) -> None:
    releases = [Release(z, batch / 250, steps)]
    assert epsilon(releases, 1e-3, "rdp") == pytest.approx(rdp, abs=0.01)
    assert epsilon(releases, 1e-3, "pld") == pytest.approx(pld, abs=0.01)


def test_t8_the_published_noise_protects_nothing() -> None:
    z = published_noise_multiplier(1e-5, clip=1000, sites=2)
    assert z == pytest.approx(2e-8)
    assert zcdp_rho(z, 50) == pytest.approx(6.25e16)
    assert epsilon([Release(z, count=50)], DELTA) == pytest.approx(6.25e16, rel=1e-3)
    assert zcdp_rho(published_noise_multiplier(1e-5, clip=1, sites=2), 50) == pytest.approx(6.25e10)


def test_exact_values_without_sampling_are_those_of_a_loss_distribution() -> None:
    """Which rounds up, by less than its grid of 1e-4 allows to show here."""
    library = PLDAccountant()
    library.compose(SelfComposedDpEvent(GaussianDpEvent(4.0), 50))
    exact = epsilon([Release(4, count=50)], DELTA)
    assert 0 <= library.get_epsilon(DELTA) - exact < 1e-3


@pytest.mark.parametrize(("z", "count", "delta"), [(1.0, 1, 1e-5), (4.0, 50, 1e-3), (0.3, 7, 1e-8), (40.0, 3, 1e-2)])
def test_without_sampling_the_closed_form_gives_back_delta(z: float, count: int, delta: float) -> None:
    """delta(eps) = Phi(-eps / mu + mu / 2) - e^eps Phi(-eps / mu - mu / 2), mu = sqrt(T) / z."""
    value, mu = epsilon([Release(z, count=count)], delta), math.sqrt(count) / z
    above = norm.cdf(-value / mu + mu / 2) - math.exp(value + norm.logcdf(-value / mu - mu / 2))
    assert value > 0
    assert above == pytest.approx(delta, rel=1e-6)


def test_releases_of_different_noise_compose_in_any_order() -> None:
    """1/z^2 adds up: 9 releases at z = 6 and 3 at z = 2 are one at z = 1."""
    releases = [Release(6, count=4), Release(2, count=3), Release(6, count=5)]
    assert epsilon(releases, DELTA) == pytest.approx(epsilon([Release(1)], DELTA))
    assert epsilon(releases[::-1], DELTA, "rdp") == epsilon(releases, DELTA, "rdp")
    assert epsilon(releases, DELTA, "rdp") == pytest.approx(epsilon([Release(1)], DELTA, "rdp"))


def test_sampled_and_whole_releases_compose() -> None:
    steps, whole = Release(2, 0.1, 20), Release(3)
    both = epsilon([steps, whole], DELTA)
    assert max(epsilon([steps], DELTA), epsilon([whole], DELTA)) < both
    assert both < epsilon([steps], DELTA / 2) + epsilon([whole], DELTA / 2)


def test_a_sampling_rate_of_nearly_one_is_nearly_no_sampling() -> None:
    assert epsilon([Release(2, 1 - 1e-9, 3)], DELTA) == pytest.approx(epsilon([Release(2, 1, 3)], DELTA), rel=1e-3)


def test_no_release_costs_nothing() -> None:
    assert epsilon([], DELTA) == 0
    assert epsilon([], DELTA, "rdp") == 0


def test_much_noise_is_worth_an_epsilon_of_zero() -> None:
    """One release at z = 10^6 has delta(0) = 4e-7."""
    assert epsilon([Release(1e6)], DELTA) == 0


def test_sampled_releases_beyond_use_keep_the_bound_by_rdp() -> None:
    """A loss distribution of it would take gigabytes; no value may jump down where RDP takes over."""
    tiny = [Release(0.05, 0.1, 100)]
    assert epsilon(tiny, DELTA) == epsilon(tiny, DELTA, "rdp") > 1000


def test_asking_again_does_not_compute_again(monkeypatch: pytest.MonkeyPatch) -> None:
    first = epsilon([Release(3, 0.2, 5), Release(3, 0.2, 6)], 1e-4, "rdp")
    monkeypatch.setattr(accounting, "RdpAccountant", None)
    assert epsilon([Release(3, 0.2, 11)], 1e-4, "rdp") == first


def test_asking_leaves_logging_as_it_is(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    epsilon([Release(1.0, 4 / 9, 3)], 2e-3)  # its Rényi orders below 2 do not converge, which the accountant logs
    assert root.handlers == []
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("accountant", accounting.ACCOUNTANTS)
def test_noise_for_sampled_steps_keeps_the_budget(accountant: Accountant) -> None:
    z = noise_multiplier_for(2, 1e-3, 40, 0.25, accountant)
    assert epsilon([Release(z, 0.25, 40)], 1e-3, accountant) <= 2
    assert epsilon([Release(z * 0.999, 0.25, 40)], 1e-3, accountant) > 2


@pytest.mark.parametrize(
    ("target", "z", "accountant", "rounds"),
    [(8, 4, "pld", 44), (8, 4, "rdp", 39), (0.1, 1, "pld", 0), (1, 1e6, "pld", MOST_ROUNDS)],
)
def test_t9_rounds_that_a_budget_allows(target: float, z: float, accountant: Accountant, rounds: int) -> None:
    assert rounds_allowed(target, DELTA, z, accountant=accountant) == rounds


def test_rounds_of_several_sampled_steps() -> None:
    rounds = rounds_allowed(3, 1e-3, 1.0, steps=10, sampling_rate=0.1)
    assert epsilon([Release(1.0, 0.1, rounds * 10)], 1e-3) <= 3
    assert epsilon([Release(1.0, 0.1, (rounds + 1) * 10)], 1e-3) > 3


def test_noise_on_the_mean() -> None:
    assert noise_std_on_mean(1, clip=1, sites=4) == 0.25
    assert noise_std_on_mean(4.244, clip=1, sites=4) == pytest.approx(1.061)
    assert published_noise_multiplier(noise_std_on_mean(3, clip=7, sites=5), clip=7, sites=5) == pytest.approx(3)


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ((0,), "noise_multiplier"),
        ((-1,), "noise_multiplier"),
        ((math.nan,), "noise_multiplier"),
        ((math.inf,), "noise_multiplier"),
        ((True,), "noise_multiplier"),
        ((1e-13,), "noise_multiplier"),
        ((1, 0), "sampling_rate"),
        ((1, 1.01), "sampling_rate"),
        ((1, math.nan), "sampling_rate"),
        ((1, 1, 0), "count"),
        ((1, 1, 2.0), "count"),
        ((1, 1, True), "count"),
    ],
)
def test_a_release_that_is_none_is_refused_by_name(values: tuple, name: str) -> None:
    with pytest.raises(ValueError, match=f"privacy accounting: {name} is"):
        Release(*values)


@pytest.mark.parametrize("delta", [0, 1, -0.1, math.nan, True, "1e-5"])
def test_a_delta_outside_its_range_is_refused(delta: float) -> None:
    with pytest.raises(ValueError, match="privacy accounting: delta is"):
        epsilon([Release(1)], delta)


def test_other_arguments_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="accountant is 'prv', expected pld or rdp"):
        epsilon([Release(1)], DELTA, "prv")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="target_epsilon is 0"):
        noise_multiplier_for(0, DELTA, 1)
    with pytest.raises(ValueError, match="count is 0"):
        noise_multiplier_for(1, DELTA, 0)
    with pytest.raises(ValueError, match="target_epsilon is -1"):
        rounds_allowed(-1, DELTA, 1)
    with pytest.raises(ValueError, match="steps is 0"):
        rounds_allowed(1, DELTA, 1, steps=0)
    with pytest.raises(ValueError, match="sites is 0"):
        noise_std_on_mean(1, 1, 0)
    with pytest.raises(ValueError, match="clip is 0"):
        published_noise_multiplier(1, 0, 1)
    with pytest.raises(ValueError, match="count is 0"):
        zcdp_rho(1, 0)


def test_an_epsilon_that_no_noise_reaches_is_refused() -> None:
    """Beyond z = e^30 nothing is looked for: with delta 1e-30 the RDP bound stays at 0.06, its largest order's."""
    with pytest.raises(ValueError, match=r"accountant 'rdp' finds no noise for target_epsilon 0\.01 at delta 1e-30"):
        noise_multiplier_for(0.01, 1e-30, 1, accountant=RDP)
