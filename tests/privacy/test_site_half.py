"""What a site does before it sends."""

from pathlib import Path
from typing import Any

import pytest
import torch

from fedcmt.algorithms.fedavg import FedAvg
from fedcmt.params import norm
from fedcmt.privacy.ledger import BudgetExceeded, LedgerError, PrivacyLedger
from fedcmt.privacy.server_half import ServerPrivacy
from fedcmt.privacy.site_half import PrivacyError, SitePrivacy, check_anew, check_cases, site_ledger
from fedcmt.privacy.terms import PrivacyTerms

SECURE = {"mode": "distributed_client_dp", "clip": 2.0, "noise_multiplier": 0.5}
CENTRAL = {"mode": "central_client_dp", "noise_multiplier": 4.0, "max_epsilon": 8.0}
CLIENT_MODES = [CENTRAL, {**CENTRAL, "mode": "distributed_client_dp"}]
INSTANCE = {"mode": "instance_dp", "noise_multiplier": 1.0, "expected_batch": 2, "delta": 1e-3}


def privacy(folder: Path, values: dict[str, Any], *, rate: float | None = None, sites: int = 4) -> SitePrivacy:
    terms = PrivacyTerms.from_dict(values, "privacy")
    return SitePrivacy(terms, name="x", folder=folder, seed=3, num_sites=sites, sampling_rate=rate, steps=5)


def test_t4_steps_are_brought_back_into_the_ball_and_inside_it_nothing_changes(tmp_path: Path) -> None:
    """T4: projection after each step and one clip at the end agree only while inside the ball."""
    received = {"w": torch.tensor([1.0, 1.0])}
    weights = {"w": torch.tensor([1.6, 1.8])}
    site = privacy(tmp_path, {"mode": "compat_noise", "clip": 1.0, "sigma": 0.0})
    site.after_step(weights, received)
    assert weights["w"].tolist() == pytest.approx([1.6, 1.8])
    weights["w"] += torch.tensor([2.4, 3.2])  # 4 further along the same line: 5 in all
    site.after_step(weights, received)
    assert weights["w"].tolist() == pytest.approx([1.6, 1.8])
    weights["w"] += torch.tensor([-0.8, 0.6])  # a step at a right angle, of length 1
    site.after_step(weights, received)
    moved = weights["w"] - received["w"]
    assert float(moved.norm()) <= 1 + 1e-6
    one_clip = torch.tensor([3.0 - 0.8, 4.0 + 0.6])
    assert not torch.allclose(moved, one_clip / one_clip.norm(), atol=1e-2)


def test_only_the_published_mode_touches_single_steps(tmp_path: Path) -> None:
    weights = {"w": torch.tensor([30.0])}
    privacy(tmp_path, SECURE).after_step(weights, {"w": torch.zeros(1)})
    assert weights["w"].item() == 30


def test_a_central_site_clips_once_over_all_tensors(tmp_path: Path) -> None:
    values = {"mode": "central_client_dp", "clip": 1.0, "noise_multiplier": 4}
    sent = privacy(tmp_path, values).outgoing({"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([0.0, 4.0])}, {}, 0)
    assert sent["a"].tolist() == pytest.approx([0.6, 0])
    assert sent["b"].tolist() == pytest.approx([0, 0.8])


def test_a_site_adds_its_share_of_the_noise(tmp_path: Path) -> None:
    """z S / sqrt(K) = 0.5 * 2 / 2 at each of four sites, so that the mean of four has z S / K."""
    sent = privacy(tmp_path, SECURE).outgoing({"w": torch.zeros(40_000)}, {}, 0)
    assert float(sent["w"].std()) == pytest.approx(0.5, rel=0.02)


def test_without_privacy_the_update_is_what_it_was(tmp_path: Path) -> None:
    delta = {"w": torch.tensor([30.0])}
    assert privacy(tmp_path, {}).outgoing(delta, {}, 0) is delta
    assert norm(delta) == 30


def test_a_site_refuses_the_round_its_own_book_does_not_allow(tmp_path: Path) -> None:
    """At q = 1 and z = 4, five steps a round: 1.55 after the first, 2.35 after the second, restart or not."""
    values = {**INSTANCE, "noise_multiplier": 4.0, "max_epsilon": 2.0}
    privacy(tmp_path, values, rate=1.0).open_round(0)
    before = (tmp_path / "privacy.jsonl").read_text()
    with pytest.raises(BudgetExceeded):
        privacy(tmp_path, values, rate=1.0).open_round(1)
    assert (tmp_path / "privacy.jsonl").read_text() == before


def test_a_covered_site_neither_scores_models_nor_sends_extras(tmp_path: Path) -> None:
    site = privacy(tmp_path, SECURE)
    with pytest.raises(PrivacyError, match="scores of models"):
        site.check_scoring()
    with pytest.raises(PrivacyError, match=r"\['anchor'\]"):
        site.outgoing({"w": torch.ones(1)}, {"anchor": torch.ones(1)}, 0)
    free = privacy(tmp_path, {})
    free.check_scoring()
    free.outgoing({"w": torch.ones(1)}, {"anchor": torch.ones(1)}, 0)


def test_a_site_whose_state_is_ahead_of_its_book_is_refused(tmp_path: Path) -> None:
    terms = PrivacyTerms.from_dict(INSTANCE, "privacy")
    more: dict[str, Any] = {"name": "x", "seed": 3, "num_sites": 2, "sampling_rate": 0.5, "steps": 5}
    SitePrivacy(terms, folder=tmp_path, **more).open_round(3)
    SitePrivacy(terms, folder=tmp_path, rounds_done=4, **more)
    with pytest.raises(LedgerError, match="no line of round 5"):
        SitePrivacy(terms, folder=tmp_path, rounds_done=5, **more)


def mode_of(values: dict[str, Any]) -> str:
    return str(values["mode"])


def ledger_of(values: dict[str, Any], folder: Path) -> PrivacyLedger:
    ledger = site_ledger(PrivacyTerms.from_dict(values, "privacy"), folder, "x")
    assert ledger is not None
    return ledger


@pytest.mark.parametrize("values", CLIENT_MODES, ids=mode_of)
@pytest.mark.parametrize("sites", [2, 10**6])
def test_t9_a_site_makes_44_rounds_and_refuses_the_45th_whatever_number_of_sites_it_is_told(
    tmp_path: Path, values: dict[str, Any], sites: int
) -> None:
    """z = 4, budget 8: 7.955 after 44 rounds."""
    for round_idx in range(44):
        if round_idx in (0, 30):  # as after a restart
            site = privacy(tmp_path, values, sites=sites)
        site.open_round(round_idx)
    before = (tmp_path / "privacy.jsonl").read_text()
    assert len(before.splitlines()) == 1 + 44
    for again in (site, privacy(tmp_path, values, sites=sites)):
        with pytest.raises(BudgetExceeded, match=r"round 45 would bring epsilon of site 'x' to 8\.064"):
            again.open_round(44)
    assert (tmp_path / "privacy.jsonl").read_text() == before


@pytest.mark.parametrize("values", CLIENT_MODES, ids=mode_of)
def test_a_round_that_was_killed_costs_server_and_site_one_more_and_no_site_refuses_before_the_server(
    tmp_path: Path, values: dict[str, Any]
) -> None:
    """z = 4, budget 2: four releases are within it, five are not, so rounds 1, 2, 2 and 3 are made."""
    terms = PrivacyTerms.from_dict({**values, "max_epsilon": 2.0}, "privacy")

    def opened(rounds_done: int) -> tuple[ServerPrivacy, SitePrivacy]:
        job: dict[str, Any] = {"seed": 3, "num_sites": 2, "rounds_done": rounds_done}
        server = ServerPrivacy(terms, FedAvg(), tmp_path / "server", **job)
        return server, SitePrivacy(terms, name="x", folder=tmp_path / "x", sampling_rate=None, steps=5, **job)

    made = []
    for start, rounds in ((0, (0, 1)), (1, (1, 2))):  # killed in the second round, which is asked for again
        server, site = opened(start)
        for round_idx in rounds:
            server.open_round(round_idx, [])
            site.open_round(round_idx)
            made.append(round_idx)
    assert made == [0, 1, 1, 2]
    assert ledger_of(values | {"max_epsilon": 2.0}, tmp_path / "x").epsilon() == server.summary(None)["epsilon"]
    for refuses in (lambda: server.open_round(3, []), lambda: site.open_round(3)):
        with pytest.raises(BudgetExceeded, match="round 4"):
            refuses()


def test_a_site_in_a_client_mode_whose_state_is_ahead_of_its_book_is_refused(tmp_path: Path) -> None:
    more: dict[str, Any] = {"name": "x", "seed": 3, "num_sites": 2, "sampling_rate": None, "steps": 5}
    with pytest.raises(LedgerError, match="no line of round 2"):
        SitePrivacy(PrivacyTerms.from_dict(CENTRAL, "privacy"), folder=tmp_path, rounds_done=2, **more)


@pytest.mark.parametrize("values", [{}, {"mode": "compat_noise", "sigma": 0.1}])
def test_where_there_is_no_epsilon_there_is_no_book(tmp_path: Path, values: dict[str, Any]) -> None:
    privacy(tmp_path, values).open_round(0)
    assert site_ledger(PrivacyTerms.from_dict(values, "privacy"), tmp_path, "x") is None
    assert list(tmp_path.iterdir()) == []


def test_a_book_is_not_left_for_terms_that_count_nothing(tmp_path: Path) -> None:
    privacy(tmp_path, CENTRAL).open_round(0)
    with pytest.raises(LedgerError, match=r"site 'x': .*privacy\.jsonl is of a federation with .* mode is 'none'"):
        site_ledger(PrivacyTerms(), tmp_path, "x")


def test_a_federation_does_not_begin_anew_where_rounds_were_charged(tmp_path: Path) -> None:
    ledger = ledger_of(CENTRAL, tmp_path)
    ledger.note("planning statistics", None, "counts")
    check_anew(ledger, "x")
    check_anew(None, "x")
    privacy(tmp_path, CENTRAL).open_round(0)
    with pytest.raises(LedgerError, match=r"site 'x': the server begins a new federation, and .*privacy\.jsonl has 1"):
        check_anew(ledger_of(CENTRAL, tmp_path), "x")


def test_scores_of_rounds_that_are_released_are_in_the_book(tmp_path: Path) -> None:
    privacy(tmp_path, {**CENTRAL, "release_metrics": True}).open_round(0)
    assert ledger_of(CENTRAL, tmp_path).uncovered() == ["round metrics: loss and validation scores"]


@pytest.mark.parametrize(
    ("changed", "fits", "words"),
    [
        ({"expected_batch": 6}, 6, r"site 'x': server\.privacy\.expected_batch is 6, expected at most 5"),
        ({"delta": 0.2}, 4, r"site 'x': server\.privacy\.delta is 0\.2, expected below 1 / 5"),
    ],
)
def test_terms_that_do_not_fit_the_number_of_cases_are_refused(
    tmp_path: Path, changed: dict[str, Any], fits: int, words: str
) -> None:
    terms, ledger = PrivacyTerms.from_dict({**INSTANCE, **changed}, ""), ledger_of({**INSTANCE, **changed}, tmp_path)
    check_cases(terms, ledger, site="x", num_cases=fits, steps=3)
    with pytest.raises(PrivacyError, match=words):
        check_cases(terms, ledger, site="x", num_cases=5, steps=3)


@pytest.mark.parametrize("values", [CENTRAL, {**INSTANCE, "noise_multiplier": 4.0}], ids=mode_of)
def test_a_budget_without_a_first_round_is_refused_and_one_that_is_used_up_is_not(
    tmp_path: Path, values: dict[str, Any]
) -> None:
    """At q = 1, z = 4: 0.926 after a release at delta 1e-5, 1.55 after five at delta 1e-3; so 0.5 is too little."""
    tight = {**values, "max_epsilon": 0.5}
    terms = PrivacyTerms.from_dict(tight, "privacy")
    with pytest.raises(BudgetExceeded, match="round 1 would bring epsilon of site 'x'"):
        check_cases(terms, ledger_of(tight, tmp_path / "new"), site="x", num_cases=2, steps=5)
    privacy(tmp_path / "used", {**tight, "max_epsilon": 8.0}, rate=1.0).open_round(0)
    book = tmp_path / "used" / "privacy.jsonl"
    book.write_text(book.read_text().replace('"max_epsilon": 8.0', '"max_epsilon": 0.5'))
    check_cases(terms, ledger_of(tight, tmp_path / "used"), site="x", num_cases=2, steps=5)


@pytest.mark.parametrize("values", [CENTRAL, {**INSTANCE, "max_epsilon": 8.0}], ids=mode_of)
def test_a_site_s_budget_changes_in_its_first_line_and_in_the_job_or_not_at_all(
    tmp_path: Path, values: dict[str, Any]
) -> None:
    privacy(tmp_path, values, rate=0.5).open_round(0)
    more, book = {**values, "max_epsilon": 9.0}, tmp_path / "privacy.jsonl"
    for refused in (lambda: ledger_of(more, tmp_path), lambda: privacy(tmp_path, more, rate=0.5)):
        with pytest.raises(LedgerError, match=r"max_epsilon is 9\.0, the ledger's is 8\.0"):
            refused()
    book.write_text(book.read_text().replace('"max_epsilon": 8.0', '"max_epsilon": 9.0'))
    privacy(tmp_path, more, rate=0.5).open_round(1)
    assert ledger_of(more, tmp_path).rounds == {0, 1}
