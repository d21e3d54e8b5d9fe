"""The trimmed mean on hand-computed tensors."""

import itertools
import re
from collections.abc import Sequence

import pytest
import torch

from fedcmt.algorithms.base import Participant, State, Update
from fedcmt.algorithms.trimmed_mean import TrimmedMean
from fedcmt.params import ParameterError


def updates(values: Sequence[Sequence[float]]) -> dict[str, Update]:
    """Of sites a, b, c, ...: each with other cases, which must not matter."""
    return {
        chr(ord("a") + i): Update({"w": torch.tensor([row])}, num_cases=10**i, num_steps=1)
        for i, row in enumerate(values)
    }


def sites(count: int, names: Sequence[str] = ("w",)) -> list[Participant]:
    return [Participant(f"s{i}", "MR", ("T1",), 5, dict.fromkeys(names, (1, 2))) for i in range(count)]


STATE = State({"w": torch.tensor([[1.0, 10.0]])})


def test_each_element_loses_its_own_largest_and_smallest() -> None:
    sent = updates([[1.0, 900.0], [2.0, 3.0], [6.0, 5.0], [-1e6, 7.0], [100.0, -800.0]])
    new = TrimmedMean(1).aggregate(STATE, sent)
    # {1, 2, 6} of the first element: 3; {3, 5, 7} of the second: 5
    assert new.params["w"].tolist() == [[4.0, 15.0]]


@pytest.mark.parametrize(("trim", "expected"), [(0.2, 31.0), (0.39, 31.0), (0.4, 3.0), (2, 3.0)])
def test_a_fraction_is_of_the_senders_and_rounded_down(trim: float, expected: float) -> None:
    sent = updates([[0.0, 0.0], [-10.0, 0.0], [3.0, 0.0], [90.0, 0.0], [1e6, 0.0]])
    # Of five, one on each side leaves {0, 3, 90}: 31; two leave the median.
    assert TrimmedMean(trim).aggregate(STATE, sent).params["w"][0, 0].item() == 1.0 + expected


@pytest.mark.parametrize("senders", [7, 100])
def test_a_fraction_that_divides_the_senders_is_not_rounded_down_further(senders: int) -> None:
    count = senders * 29 // 100 if senders == 100 else 2
    trim = 0.29 if senders == 100 else 2 / 7
    assert TrimmedMean(trim)._count("w", senders) == count


def test_as_many_sites_as_are_trimmed_cannot_leave_the_range_of_the_others() -> None:
    honest = [[1.0, 4.0], [2.0, 5.0], [3.0, 6.0]]
    for sign in (-1, 1):
        moved = TrimmedMean(2).aggregate(STATE, updates([*honest, [sign * 1e6, 0.0], [sign * 1e5, 0.0]]))
        assert 1.0 <= moved.params["w"][0, 0].item() - 1.0 <= 3.0


def test_the_order_of_sites_changes_no_bit() -> None:
    sent = updates([[0.1, 1e8], [0.2, 1.0], [0.3, -1e8], [0.7, 3.0]])
    orders = itertools.permutations(sent.items())
    results = [TrimmedMean(1).aggregate(STATE, dict(order)).params["w"] for order in orders]
    assert all(torch.equal(result, results[0]) for result in results)


def test_a_tensor_that_no_site_sent_stays() -> None:
    state = State({**STATE.params, "x": torch.tensor([7.0])})
    assert TrimmedMean(1).aggregate(state, updates([[1.0, 1.0]] * 3)).params["x"].tolist() == [7.0]


def test_each_tensor_is_trimmed_over_the_sites_that_sent_it() -> None:
    sent = updates([[1.0, 1.0], [2.0, 2.0], [9.0, 9.0], [4.0, 4.0]])
    for value, site in ((5.0, "b"), (6.0, "c"), (50.0, "d")):
        sent[site].delta["g@mr"] = torch.tensor([value])
    state = State({**STATE.params, "g@mr": torch.tensor([0.0])})
    new = TrimmedMean(1).aggregate(state, sent)
    assert new.params["w"].tolist() == [[4.0, 13.0]]  # (2 + 4) / 2 = 3
    assert new.params["g@mr"].tolist() == [6.0]


@pytest.mark.parametrize(("trim", "count"), [(1, 2), (2, 4), (0.3, 3), (0.1, 9)])
def test_too_few_sites_are_refused_before_the_first_round(trim: float, count: int) -> None:
    with pytest.raises(ParameterError, match=re.escape(f"trim {trim} leaves out")):
        TrimmedMean(trim).init(STATE.params, sites(count), 5)


@pytest.mark.parametrize(("trim", "count"), [(1, 3), (2, 5), (0.34, 3), (0.1, 10)])
def test_enough_sites_are_taken(trim: float, count: int) -> None:
    assert TrimmedMean(trim).init(STATE.params, sites(count), 5).params.keys() == {"w"}


def test_a_tensor_that_few_sites_have_is_named() -> None:
    everyone = [*sites(3), *sites(1, ["w", "g@ct"])]
    with pytest.raises(ParameterError, match=r"g@ct, which 1 sites exchange"):
        TrimmedMean(1).init(STATE.params, everyone, 5)


def test_a_round_with_too_few_answers_is_refused() -> None:
    with pytest.raises(ParameterError, match=r"which 2 sites"):
        TrimmedMean(1).aggregate(STATE, updates([[1.0, 1.0], [2.0, 2.0]]))


def test_foreign_names_shapes_and_no_updates_are_refused() -> None:
    foreign = {site: Update({"x": torch.ones(1)}, 1, 1) for site in "abc"}
    with pytest.raises(ParameterError, match=r"unknown \[x\]"):
        TrimmedMean(1).aggregate(STATE, foreign)
    with pytest.raises(ParameterError, match="no update"):
        TrimmedMean(1).aggregate(STATE, {})
    uneven = updates([[1.0, 1.0]] * 3)
    uneven["b"].delta["w"] = torch.ones(2, 1)
    with pytest.raises(ParameterError, match=r"w has different shapes.*\(2, 1\)"):
        TrimmedMean(1).aggregate(STATE, uneven)


@pytest.mark.parametrize("trim", [0, -1, 0.5, 1.5, True, "1", float("nan")])
def test_a_trim_that_cannot_be_is_refused(trim: float) -> None:
    with pytest.raises(ValueError, match=r"TrimmedMean: trim is .*expected a whole number from 1"):
        TrimmedMean(trim)
