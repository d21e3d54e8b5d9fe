"""The coordinate-wise median on hand-computed tensors."""

import pytest
import torch

from fedcmt.algorithms.base import Participant, State, Update
from fedcmt.algorithms.coordinate_median import CoordinateMedian
from fedcmt.params import ParameterError

STATE = State({"w": torch.tensor([[0.0, 10.0, 20.0]])})


def updates(*rows: list[float]) -> dict[str, Update]:
    """Each of a site with other cases, which must not matter."""
    return {
        f"s{i}": Update({"w": torch.tensor([row])}, num_cases=10 ** (5 - i), num_steps=1) for i, row in enumerate(rows)
    }


def test_each_element_has_its_own_median() -> None:
    sent = updates([1.0, 9.0, -3.0], [5.0, 7.0, -1e6], [3.0, 8.0, 4.0])
    assert CoordinateMedian().aggregate(STATE, sent).params["w"].tolist() == [[3.0, 18.0, 17.0]]


def test_of_an_even_number_the_two_in_the_middle_are_averaged() -> None:
    sent = updates([1.0, 1.0, 1.0], [2.0, 2.0, 9.0], [4.0, 8.0, 2.0], [1e6, 0.0, 3.0])
    assert CoordinateMedian().aggregate(STATE, sent).params["w"].tolist() == [[3.0, 11.5, 22.5]]


def test_a_minority_cannot_leave_the_range_of_the_others() -> None:
    honest = ([1.0, -1.0, 0.5], [2.0, -2.0, 0.6], [3.0, -3.0, 0.7])
    wild = ([1e6, 1e6, 1e6], [1e5, -1e6, 1e6])
    step = CoordinateMedian().aggregate(STATE, updates(*wild, *honest)).params["w"] - STATE.params["w"]
    low, high = torch.tensor(honest).amin(0), torch.tensor(honest).amax(0)
    assert bool(((step[0] >= low - 1e-5) & (step[0] <= high + 1e-5)).all())


def test_a_group_tensor_has_the_median_of_its_owners() -> None:
    state = State({**STATE.params, "g@ct": torch.tensor([1.0, 2.0])})
    sent = updates([1.0, 1.0, 1.0], [1.0, 1.0, 1.0], [1.0, 1.0, 1.0])
    for site, value in (("s1", 4.0), ("s2", 8.0)):
        sent[site].delta["g@ct"] = torch.tensor([value, -value])
    assert CoordinateMedian().aggregate(state, sent).params["g@ct"].tolist() == [7.0, -4.0]


def test_two_sites_are_refused_before_the_first_round_since_their_median_is_the_mean() -> None:
    sites = [Participant(name, "MR", ("T1",), 5, {"w": (1, 3)}) for name in "abc"]
    with pytest.raises(ParameterError, match=r"1 tensors, e\.g\. w, are exchanged by fewer than 3 sites \(2\)"):
        CoordinateMedian().init(STATE.params, sites[:2], 5)
    assert CoordinateMedian().init(STATE.params, sites, 5).params.keys() == {"w"}
