"""What the server does to updates, on two tensors of few values."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from fedcmt.algorithms.base import Algorithm, Participant, State, Update
from fedcmt.algorithms.fedavg import FedAvg
from fedcmt.algorithms.fedbn import FedBN
from fedcmt.algorithms.fedcmt import FedCMT
from fedcmt.algorithms.fedhca2 import FedHCA2
from fedcmt.algorithms.fedmepd import FedMEPD
from fedcmt.algorithms.fedopt import FedOpt
from fedcmt.algorithms.fedper import FedPer
from fedcmt.algorithms.fedprox import FedProx
from fedcmt.algorithms.standalone import Standalone
from fedcmt.params import ParameterError
from fedcmt.privacy.ledger import BudgetExceeded, LedgerError
from fedcmt.privacy.server_half import LEDGER_FILE, ServerPrivacy, check_algorithm, check_update
from fedcmt.privacy.terms import PrivacyTerms

SHAPES = {"a": (1,), "b": (1,)}
CENTRAL = {"mode": "central_client_dp", "clip": 1.0, "noise_multiplier": 1.0, "noise": "seeded"}
DISTRIBUTED = {**CENTRAL, "mode": "distributed_client_dp"}
INSTANCE = {"mode": "instance_dp", "noise_multiplier": 1.0, "expected_batch": 2, "delta": 1e-3}
COMPAT = {"mode": "compat_noise", "clip": 1000, "sigma": 1e-5}


def site(name: str, shapes: Mapping[str, tuple[int, ...]] = SHAPES) -> Participant:
    return Participant(name, "MR", ("T1",), 5, shapes)


def update(a: float, b: float, num_cases: int = 5) -> Update:
    return Update({"a": torch.tensor([float(a)]), "b": torch.tensor([float(b)])}, num_cases, num_steps=3)


def privacy(folder: Path, values: dict[str, Any], algorithm: Algorithm | None = None, sites: int = 2) -> ServerPrivacy:
    terms = PrivacyTerms.from_dict(values, "privacy")
    return ServerPrivacy(terms, algorithm or FedAvg(), folder, seed=7, num_sites=sites)


def test_without_privacy_updates_are_what_they_were_and_nothing_is_written(tmp_path: Path) -> None:
    none = privacy(tmp_path, {})
    none.open_round(0, [site("x")])
    sent = {"x": update(3, 4)}
    assert none.protect(sent, [site("x")], {}, 0) == sent
    assert none.summary(None) is None
    assert list(tmp_path.iterdir()) == []


def test_t3_clipped_updates_of_two_sites_count_alike_in_the_mean(tmp_path: Path) -> None:
    """T3: w = [1, 1], deltas [3, 4] and [0, .5], S = 1, K = 2, no noise: [1.3, 1.65]; whatever the case counts."""
    quiet = privacy(tmp_path, {"mode": "compat_noise", "clip": 1.0, "sigma": 0.0})
    sites = [site("x"), site("y")]
    seen = quiet.protect({"x": update(3, 4, 90), "y": update(0, 0.5, 10)}, sites, {}, 0)
    state = FedAvg().aggregate(State({"a": torch.ones(1), "b": torch.ones(1)}), seen)
    assert state.params["a"].item() == pytest.approx(1.3)
    assert state.params["b"].item() == pytest.approx(1.65)


def spread(folder: Path, values: dict[str, Any], algorithm: Algorithm, sites: int) -> float:
    """Standard deviation of the noise on the mean over sites of a large zero update."""
    count = 40_000
    members = [site(f"s{i}", {"w": (count,)}) for i in range(sites)]
    seen = privacy(folder, values, algorithm, sites).protect(
        {m.name: Update({"w": torch.zeros(count)}, 3, 1) for m in members}, members, {}, 0
    )
    return float(torch.stack([u.delta["w"] for u in seen.values()]).mean(0).std())


@pytest.mark.parametrize(
    ("values", "algorithm", "std"),
    [
        (CENTRAL, FedAvg(), 0.25),
        ({**CENTRAL, "noise_multiplier": 4.244}, FedAvg(), 1.061),
        ({**CENTRAL, "clip": 3.0}, FedPer("head"), 0.75),
        (CENTRAL, FedCMT(), 0.5),
        ({"mode": "compat_noise", "clip": 9.0, "sigma": 0.3, "noise": "seeded"}, FedAvg(), 0.3),
    ],
)
def test_t5_noise_on_the_mean_of_four_sites(
    tmp_path: Path, values: dict[str, Any], algorithm: Algorithm, std: float
) -> None:
    """T5: z S / K where only the mean is looked at; z S on each update, so z S / sqrt(K), where single ones are."""
    assert spread(tmp_path, values, algorithm, 4) == pytest.approx(std, rel=0.02)


def test_sigma_of_the_published_noise_does_not_depend_on_the_number_of_sites(tmp_path: Path) -> None:
    values = {"mode": "compat_noise", "clip": 9.0, "sigma": 0.3, "noise": "seeded"}
    assert spread(tmp_path, values, FedAvg(), 2) == pytest.approx(0.3, rel=0.02)


def test_noise_differs_between_rounds_sites_and_seeds_and_repeats_otherwise(tmp_path: Path) -> None:
    sites, sent = [site("x"), site("y")], {"x": update(0, 0), "y": update(0, 0)}
    first = privacy(tmp_path, CENTRAL)
    seen = first.protect(sent, sites, {}, 0)
    assert seen["x"].delta["a"] != seen["y"].delta["a"]
    assert seen["x"].delta["a"] != seen["x"].delta["b"]
    assert first.protect(sent, sites, {}, 1)["x"].delta["a"] != seen["x"].delta["a"]
    assert first.protect(sent, sites, {}, 0)["x"].delta["a"] == seen["x"].delta["a"]


def test_the_mean_has_a_fixed_denominator_when_a_site_is_missing(tmp_path: Path) -> None:
    members = [site("x"), site("y")]
    quiet = {**CENTRAL, "noise_multiplier": 1e-9}
    seen = privacy(tmp_path, quiet).protect({"x": update(0.6, 0)}, members, {"y": {"b"}}, 0)
    assert set(seen) == {"x", "y"}
    assert set(seen["y"].delta) == {"a"}
    mean = FedAvg().aggregate(State({"a": torch.zeros(1), "b": torch.zeros(1)}), seen)
    assert mean.params["a"].item() == pytest.approx(0.3, abs=1e-6)


def test_a_site_that_is_missing_is_not_made_up_where_single_updates_are_looked_at(tmp_path: Path) -> None:
    seen = privacy(tmp_path, CENTRAL, FedCMT()).protect({"x": update(1, 0)}, [site("x"), site("y")], {}, 0)
    assert set(seen) == {"x"}


def test_t9_round_44_is_allowed_and_round_45_refused_also_after_a_restart(tmp_path: Path) -> None:
    values = {**CENTRAL, "noise_multiplier": 4.0, "max_epsilon": 8.0}
    before = privacy(tmp_path, values)
    for round_idx in range(20):
        before.open_round(round_idx, [])
    terms = PrivacyTerms.from_dict(values, "privacy")
    after = ServerPrivacy(terms, FedAvg(), tmp_path, seed=7, num_sites=2, rounds_done=20)
    for round_idx in range(20, 44):
        after.open_round(round_idx, [])
    told = after.summary(None)
    assert told is not None
    assert told["epsilon"] == pytest.approx(7.955, abs=0.02)
    with pytest.raises(BudgetExceeded):
        after.open_round(44, [])
    assert after.summary("why")["epsilon"] == told["epsilon"]


def test_a_new_federation_sets_the_older_ledger_aside(tmp_path: Path) -> None:
    privacy(tmp_path, CENTRAL).open_round(0, [])
    spent = (tmp_path / LEDGER_FILE).read_text()
    privacy(tmp_path, {**CENTRAL, "delta": 1e-3}).open_round(0, [])
    assert (tmp_path / "privacy_earlier_1.jsonl").read_text() == spent


def test_a_state_that_is_ahead_of_its_ledger_is_refused(tmp_path: Path) -> None:
    privacy(tmp_path, CENTRAL).open_round(0, [])
    terms = PrivacyTerms.from_dict(CENTRAL, "privacy")
    with pytest.raises(LedgerError, match="no line of round 2"):
        ServerPrivacy(terms, FedAvg(), tmp_path, seed=7, num_sites=2, rounds_done=2)


def test_noise_that_turns_out_to_be_missing_is_counted_above_the_budget_too(tmp_path: Path) -> None:
    server = privacy(tmp_path, {**DISTRIBUTED, "noise_multiplier": 4.0, "max_epsilon": 1.2})
    server.open_round(0, [])
    with pytest.raises(BudgetExceeded, match="has brought epsilon to"):
        server.protect({"x": update(0, 0)}, [site("x"), site("y")], {}, 0)
    told = server.summary("stopped")
    assert told is not None
    assert told["epsilon"] > 1.2


def test_sites_must_exchange_the_same_tensors_for_their_noise_to_add_up(tmp_path: Path) -> None:
    server = privacy(tmp_path, DISTRIBUTED)
    server.admit(site("x"), None)
    with pytest.raises(ValueError, match="site 'y': exchanges other tensors"):
        server.admit(site("y", {"a": (1,)}), None)


def test_what_is_protected_goes_where_it_is_told_to(tmp_path: Path) -> None:
    kept: dict[str, object] = {}
    members = [site("x"), site("y")]
    seen = privacy(tmp_path, CENTRAL).protect({"x": update(1, 0)}, members, {}, 0, lambda s, t: kept.setdefault(s, t))
    assert {name: u.delta for name, u in seen.items()} == kept


@pytest.mark.parametrize("algorithm", [Standalone(), FedPer("all")])
def test_covering_what_is_not_sent_is_refused(algorithm: Algorithm) -> None:
    with pytest.raises(ValueError, match="they send nothing"):
        check_algorithm(PrivacyTerms.from_dict(CENTRAL, "privacy"), algorithm)


def test_noise_that_is_missing_with_a_site_costs_more(tmp_path: Path) -> None:
    members = [site("x"), site("y")]

    def epsilon(folder: str, sent: dict[str, Update]) -> float:
        server = privacy(tmp_path / folder, DISTRIBUTED)
        server.open_round(0, members)
        server.protect(sent, members, {}, 0)
        told = server.summary(None)
        assert told is not None
        return float(told["epsilon"])

    whole = epsilon("whole", {"x": update(0, 0), "y": update(0, 0)})
    half = epsilon("half", {"x": update(0, 0)})
    weaker = privacy(tmp_path / "weaker", {**CENTRAL, "noise_multiplier": 1 / math.sqrt(2)})
    weaker.open_round(0, members)
    assert half == pytest.approx(weaker.summary(None)["epsilon"])
    assert half > whole


def test_an_update_beyond_clip_and_noise_is_refused_by_name(tmp_path: Path) -> None:
    server = privacy(tmp_path, DISTRIBUTED)
    assert check_update(server, "x", update(2, 1)) is not None
    with pytest.raises(ParameterError, match="site 'x': norm 50"):
        check_update(server, "x", update(30, 40))


def test_extras_are_refused_where_nothing_covers_them(tmp_path: Path) -> None:
    with_extras = Update({"a": torch.ones(1)}, 5, 3, extras={"anchor": torch.ones(2)})
    with pytest.raises(ParameterError, match="anchor"):
        check_update(privacy(tmp_path, CENTRAL), "x", with_extras)
    assert check_update(privacy(tmp_path, {}), "x", with_extras) is with_extras


@pytest.mark.parametrize("algorithm", [FedCMT(), FedHCA2()])
def test_products_of_single_updates_are_refused_under_distributed_noise(algorithm: Algorithm) -> None:
    terms = PrivacyTerms.from_dict(DISTRIBUTED, "privacy")
    with pytest.raises(ValueError, match=f"{type(algorithm).__name__}'s server works on single"):
        check_algorithm(terms, algorithm)


@pytest.mark.parametrize("algorithm", [FedAvg(), FedPer("head"), FedBN(), FedOpt(), FedProx()])
def test_means_are_taken_under_distributed_noise(algorithm: Algorithm) -> None:
    check_algorithm(PrivacyTerms.from_dict(DISTRIBUTED, "privacy"), algorithm)


@pytest.mark.parametrize("algorithm", [FedAvg(), FedPer("head"), FedBN(), FedOpt(), FedProx(), FedCMT(), FedHCA2()])
@pytest.mark.parametrize("values", [{}, COMPAT, CENTRAL, INSTANCE], ids=lambda values: values.get("mode", "none"))
def test_other_terms_are_kept_by_every_algorithm_that_sends_updates_only(
    algorithm: Algorithm, values: dict[str, Any]
) -> None:
    assert not algorithm.sends_extras
    check_algorithm(PrivacyTerms.from_dict(values, "privacy"), algorithm)


@pytest.mark.parametrize("values", [CENTRAL, DISTRIBUTED, INSTANCE], ids=lambda values: values["mode"])
def test_an_algorithm_that_sends_more_than_updates_is_refused_where_sites_or_cases_are_covered(
    values: dict[str, Any],
) -> None:
    assert FedMEPD().sends_extras
    with pytest.raises(ValueError, match=rf"under FedMEPD sites send tensors beside .* no noise of {values['mode']}"):
        check_algorithm(PrivacyTerms.from_dict(values, "privacy"), FedMEPD())
    for free in ({}, COMPAT):
        check_algorithm(PrivacyTerms.from_dict(free, "privacy"), FedMEPD())


@pytest.mark.parametrize("values", [CENTRAL, DISTRIBUTED], ids=lambda values: values["mode"])
def test_a_budget_that_the_first_round_exceeds_is_known_from_the_terms(tmp_path: Path, values: dict[str, Any]) -> None:
    """z = 4 at delta 1e-5: 0.926 after a round."""
    privacy(tmp_path / "enough", {**values, "noise_multiplier": 4.0, "max_epsilon": 0.95}).check_budget()
    with pytest.raises(BudgetExceeded, match=r"round 1 would bring epsilon to 0\.926"):
        privacy(tmp_path / "less", {**values, "noise_multiplier": 4.0, "max_epsilon": 0.8}).check_budget()


def test_a_delta_that_gives_a_case_away_is_refused_by_the_site_it_does_so_at(tmp_path: Path) -> None:
    """Sites of 5 cases: delta must be below 0.2."""
    often = {"rate": 0.4, "steps": 3}
    privacy(tmp_path / "below", {**INSTANCE, "delta": 0.19}).admit(site("x"), often)
    with pytest.raises(ValueError, match=r"site 'x': server.privacy.delta is 0.2, expected below 1 / 5"):
        privacy(tmp_path / "at", {**INSTANCE, "delta": 0.2}).admit(site("x"), often)


@pytest.mark.parametrize("values", [CENTRAL, DISTRIBUTED], ids=lambda values: values["mode"])
def test_a_delta_that_gives_a_site_away_is_refused_where_sites_are_protected(
    tmp_path: Path, values: dict[str, Any]
) -> None:
    """Five sites: delta must be below 0.2."""
    privacy(tmp_path / "below", {**values, "delta": 0.19}, sites=5)
    with pytest.raises(ValueError, match=r"^server.privacy.delta is 0.2, expected below 1 / 5, the number of sites"):
        privacy(tmp_path / "at", {**values, "delta": 0.2}, sites=5)


def test_the_site_that_draws_most_often_decides_epsilon(tmp_path: Path) -> None:
    values = {"mode": "instance_dp", "noise_multiplier": 1.0, "expected_batch": 2, "delta": 1e-3}

    def epsilon(folder: str, rates: dict[str, float]) -> float:
        server = privacy(tmp_path / folder, values)
        for name, rate in rates.items():
            server.admit(site(name), {"rate": rate, "steps": 4})
        server.open_round(0, [site(name) for name in rates])
        return float(server.summary(None)["epsilon"])

    both = epsilon("both", {"x": 0.1, "y": 0.5})
    assert both == pytest.approx(epsilon("often", {"y": 0.5}))
    assert both > epsilon("rarely", {"x": 0.1})


@pytest.mark.parametrize("sampling", [None, {"rate": 0.0, "steps": 3}, {"rate": 0.5}, {"rate": 0.5, "steps": 0}])
def test_a_site_must_say_how_it_draws(tmp_path: Path, sampling: dict[str, Any] | None) -> None:
    values = {"mode": "instance_dp", "noise_multiplier": 1.0, "expected_batch": 2}
    with pytest.raises(ValueError, match="site 'x': sampling"):
        privacy(tmp_path, values).admit(site("x"), sampling)


def test_the_published_noise_has_no_epsilon(tmp_path: Path) -> None:
    told = privacy(tmp_path, {"mode": "compat_noise", "clip": 1000, "sigma": 1e-5}).summary(None)
    assert told is not None
    assert told["epsilon"] is None
    assert told["statement"] == "no formal guarantee"
    assert list(tmp_path.iterdir()) == []
