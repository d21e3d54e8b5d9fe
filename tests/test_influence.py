"""Bounding one site's influence on hand-computed updates."""

import copy
import math
from pathlib import Path

import pytest
import torch

from fedcmt.algorithms.base import Update
from fedcmt.influence import influence_factors, scale_updates
from fedcmt.params import norm
from fedcmt.uploads import SpooledUpdates


def of(**tensors: list[float]) -> Update:
    return Update({name: torch.tensor(values) for name, values in tensors.items()}, num_cases=3, num_steps=7)


def alike(*sizes: float) -> dict[str, Update]:
    """Sites a, b, ... whose updates have these 2-norms over two tensors: 0.6² + 0.8² = 1."""
    return {chr(ord("a") + i): of(w=[0.6 * size, 0.0, 0.0], v=[0.0, 0.8 * size]) for i, size in enumerate(sizes)}


def test_an_oversized_update_is_scaled_to_the_multiple_of_the_median_norm() -> None:
    updates = alike(1.0, 2.0, 50.0)
    factors = influence_factors(updates, 2.5)
    assert factors == {"a": 1.0, "b": 1.0, "c": pytest.approx(5.0 / 50.0)}
    scaled = scale_updates(updates, factors, lambda site, tensors: tensors)
    assert norm(scaled["c"].delta) == pytest.approx(5.0)
    torch.testing.assert_close(scaled["c"].delta["v"], torch.tensor([0.0, 4.0]))
    assert (scaled["a"], scaled["b"]) == (updates["a"], updates["b"])
    assert (scaled["c"].num_cases, scaled["c"].num_steps) == (3, 7)


def test_of_an_even_number_the_median_is_the_mean_of_the_middle_two() -> None:
    assert influence_factors(alike(1.0, 2.0, 4.0, 30.0), 1.0)["d"] == pytest.approx(3.0 / 30.0)


@pytest.mark.parametrize("wild", [1e2, 1e6])
def test_how_far_an_outlier_is_out_does_not_move_the_bound(wild: float) -> None:
    assert wild * influence_factors(alike(1.0, 1.5, 2.0, 2.5, wild), 3.0)["e"] == pytest.approx(6.0)


def test_updates_within_the_bound_stay_as_they_are() -> None:
    assert set(influence_factors(alike(1.0, 2.0, 4.0), 2.0).values()) == {1.0}


def test_tensors_that_few_sites_send_are_compared_among_these() -> None:
    updates = {
        "a": of(w=[1.0], mr=[1.0, 1.0]),
        "b": of(w=[1.0], mr=[1.0, 1.0]),
        "c": of(w=[1.0], mr=[8.0, 8.0]),
        "d": of(w=[1.0], ct=[70.0]),
        "e": of(w=[1.0], ct=[70.0]),
    }
    # An update with large tensors of its own is not oversized beside sites that do not send them.
    assert influence_factors(updates, 2.0) == {"a": 1.0, "b": 1.0, "c": 0.25, "d": 1.0, "e": 1.0}


def test_a_site_is_scaled_as_a_whole_by_its_most_oversized_part() -> None:
    updates = {
        "a": of(w=[1.0], g=[1.0]), "b": of(w=[1.0], g=[1.0]), "c": of(w=[1.0]), "d": of(w=[4.0], g=[20.0]),
    }  # fmt: skip
    factors = influence_factors(updates, 2.0)
    assert factors["d"] == 2.0 / 20.0  # of w alone it would be 2 / 4
    scaled = scale_updates(updates, factors, lambda site, tensors: tensors)["d"]
    torch.testing.assert_close(scaled.delta, {"w": torch.tensor([0.4]), "g": torch.tensor([2.0])})


def test_sites_with_more_rows_of_a_tensor_are_not_larger_for_it() -> None:
    updates = {"a": of(w=[1.0]), "b": of(w=[1.0] * 9), "c": of(w=[1.0] * 4), "d": of(w=[3.0, 3.0])}
    assert influence_factors(updates, 1.5) == pytest.approx({"a": 1.0, "b": 1.0, "c": 1.0, "d": 0.5})


def test_a_lone_sender_keeps_its_size() -> None:
    assert influence_factors({"a": of(w=[1e5])}, 1.0) == {"a": 1.0}


def test_of_two_senders_only_a_ratio_below_two_bounds() -> None:
    assert influence_factors(alike(1.0, 1000.0), 2.0) == {"a": 1.0, "b": 1.0}
    assert influence_factors(alike(1.0, 7.0), 1.5)["b"] == pytest.approx(6.0 / 7.0)


def test_a_part_that_most_sites_left_at_zero_sets_no_bound() -> None:
    updates = {"a": of(w=[0.0]), "b": of(w=[0.0]), "c": of(w=[5.0])}
    assert influence_factors(updates, 2.0)["c"] == 1.0


def test_empty_tensors_and_no_updates_have_no_size() -> None:
    assert influence_factors({"a": of(w=[]), "b": of(w=[])}, 1.0) == {"a": 1.0, "b": 1.0}
    assert influence_factors({}, 1.0) == {}


def test_the_order_of_sites_does_not_matter_and_nothing_is_changed() -> None:
    updates = alike(1.0, 2.0, 50.0)
    before = copy.deepcopy(updates)
    backward = influence_factors(dict(reversed(updates.items())), 2.0)
    assert backward == influence_factors(updates, 2.0)
    scale_updates(updates, backward, lambda site, tensors: tensors)
    assert all(torch.equal(updates[s].delta[n], t) for s, u in before.items() for n, t in u.delta.items())


def test_only_scaled_uploads_are_written_again(tmp_path: Path) -> None:
    with SpooledUpdates(tmp_path / "uploads") as uploads, SpooledUpdates(tmp_path / "bounded") as bounded:
        updates = {
            site: Update(uploads.add(site, update.delta), num_cases=1, num_steps=1)
            for site, update in alike(1.0, 2.0, 50.0).items()
        }
        scaled = scale_updates(updates, influence_factors(updates, 1.0), bounded.add)
        assert len(list((tmp_path / "bounded").iterdir())) == 1
        assert norm(updates["c"].delta) == pytest.approx(50.0)
        assert norm(scaled["c"].delta) == pytest.approx(2.0)


@pytest.mark.parametrize("ratio", [0.99, 0, -1, math.nan, math.inf, True])
def test_a_ratio_that_would_scale_the_median_itself_is_refused(ratio: float) -> None:
    with pytest.raises(ValueError, match=r"ratio is .*a number from 1"):
        influence_factors({}, ratio)
