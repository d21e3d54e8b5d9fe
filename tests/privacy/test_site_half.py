"""What a site does before it sends."""

from pathlib import Path
from typing import Any

import pytest
import torch

from fedcmt.params import norm
from fedcmt.privacy.ledger import BudgetExceeded, LedgerError
from fedcmt.privacy.site_half import PrivacyError, SitePrivacy
from fedcmt.privacy.terms import PrivacyTerms

SECURE = {"mode": "distributed_client_dp", "clip": 2.0, "noise_multiplier": 0.5}
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
