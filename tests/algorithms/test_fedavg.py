"""FedAvg on hand-computed tensors."""

import copy
import itertools

import pytest
import torch
from torch import Tensor

from fedcmt.algorithms.base import State, Update
from fedcmt.algorithms.fedavg import FedAvg, weighted_mean
from fedcmt.params import ParameterError


def update(num_cases: int = 1, **delta: Tensor) -> Update:
    return Update(delta=delta, num_cases=num_cases, num_steps=7)


def test_the_update_is_the_mean_weighted_by_cases() -> None:
    state = State({"w": torch.tensor([[1.0, 10.0, 100.0]])})
    updates = {
        "a": update(1, w=torch.tensor([[4.0, 0.0, -8.0]])),
        "b": update(3, w=torch.tensor([[0.0, 4.0, 8.0]])),
    }
    new = FedAvg().aggregate(state, updates)
    # (1 * 4 + 3 * 0) / 4 = 1; (0 + 3 * 4) / 4 = 3; (-8 + 3 * 8) / 4 = 4
    assert new.params["w"].tolist() == [[2.0, 13.0, 104.0]]


def test_a_tensor_some_sites_sent_is_the_mean_of_those() -> None:
    updates = {
        "a": update(1, **{"w": torch.tensor([8.0]), "x@mr.t1": torch.tensor([1.0, 2.0])}),
        "b": update(3, **{"w": torch.tensor([0.0]), "x@mr.t1": torch.tensor([5.0, 6.0])}),
        "c": update(4, **{"w": torch.tensor([16.0]), "x@ct": torch.tensor([9.0])}),
    }
    mean = weighted_mean(updates, {"a": 1.0, "b": 3.0, "c": 4.0})
    assert mean["w"].tolist() == [9.0]  # (1 * 8 + 3 * 0 + 4 * 16) / 8
    assert mean["x@mr.t1"].tolist() == [4.0, 5.0]  # (1 + 3 * 5) / 4, (2 + 3 * 6) / 4
    assert mean["x@ct"].tolist() == [9.0]  # c alone, weight 1


def test_the_scale_of_the_weights_does_not_matter() -> None:
    updates = {"a": update(w=torch.tensor([4.0])), "b": update(w=torch.tensor([8.0]))}
    assert weighted_mean(updates, {"a": 0.25, "b": 0.75})["w"].tolist() == [7.0]
    assert weighted_mean(updates, {"a": 50.0, "b": 150.0})["w"].tolist() == [7.0]


def test_the_order_of_sites_changes_no_bit() -> None:
    # In float64 (1e16 + 1) - 1e16 is 0 and (1e16 - 1e16) + 1 is 1.
    updates = {
        site: update(w=torch.tensor([v], dtype=torch.float64)) for site, v in zip("abc", (3e16, 3, -3e16), strict=True)
    }
    weights = dict.fromkeys("abc", 1.0)
    means = [weighted_mean(dict(order), weights)["w"] for order in itertools.permutations(updates.items())]
    assert all(torch.equal(mean, means[0]) for mean in means)


def test_sums_run_in_float64() -> None:
    # In float32 1e8 + 1 is 1e8: the mean of (1e8, 1, 1, -1e8) would come out as 0.25 or 0.
    updates = {site: update(w=torch.tensor([v])) for site, v in zip("abcd", (1e8, 1.0, 1.0, -1e8), strict=True)}
    mean = weighted_mean(updates, dict.fromkeys("abcd", 1.0))["w"]
    assert mean.tolist() == [0.5]
    assert mean.dtype == torch.float32


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan")])
def test_weights_that_are_not_positive_are_refused_by_site(weight: float) -> None:
    updates = {"a": update(w=torch.ones(1)), "b": update(w=torch.ones(1))}
    with pytest.raises(ParameterError, match=rf"weights must be positive, got {{'b': {weight}}}"):
        weighted_mean(updates, {"a": 1.0, "b": weight})


def test_a_site_without_cases_is_refused() -> None:
    state = State({"w": torch.zeros(1)})
    with pytest.raises(ParameterError, match=r"'b': 0\.0"):
        FedAvg().aggregate(state, {"a": update(2, w=torch.ones(1)), "b": update(0, w=torch.ones(1))})


def test_no_update_is_refused() -> None:
    with pytest.raises(ParameterError, match="no update to average"):
        weighted_mean({}, {})


def test_a_tensor_the_server_does_not_hold_is_refused() -> None:
    with pytest.raises(ParameterError, match=r"1 unknown \[v\]"):
        FedAvg().aggregate(State({"w": torch.zeros(1)}), {"a": update(w=torch.ones(1), v=torch.ones(1))})


def test_inputs_stay_as_they_are() -> None:
    state, updates = State({"w": torch.tensor([1.0])}), {"a": update(w=torch.tensor([2.0]))}
    before = copy.deepcopy((state, updates))
    new = FedAvg().aggregate(state, updates)
    new.params["w"].zero_()
    assert torch.equal(state.params["w"], before[0].params["w"])
    assert torch.equal(updates["a"].delta["w"], before[1]["a"].delta["w"])


def test_tensors_nobody_sent_keep_their_bits() -> None:
    # Adding a zero would turn -0.0 into 0.0.
    state = State({"w": torch.zeros(1), "x@ct": torch.tensor([-0.0, 1e-40])})
    new = FedAvg().aggregate(state, {"a": update(w=torch.ones(1))})
    bits = [s.params["x@ct"].view(torch.int32) for s in (state, new)]
    assert torch.equal(*bits)
    assert list(new.params) == list(state.params)


def test_the_algorithm_s_memory_is_carried_along() -> None:
    state = State({"w": torch.zeros(1)}, memory={"m": torch.tensor([3.0])}, record={"k": 1})
    new = FedAvg().aggregate(state, {"a": update(w=torch.ones(1))})
    assert new.memory["m"].tolist() == [3.0]
    assert new.record == {"k": 1}


def test_deltas_of_different_shapes_are_refused_by_site() -> None:
    updates = {"a": Update({"w": torch.ones(3)}, 1, 1), "b": Update({"w": torch.ones(1)}, 1, 1)}
    with pytest.raises(ParameterError, match=r"w has different shapes: .*'b': \(1,\)"):
        weighted_mean(updates, {"a": 1.0, "b": 1.0})


def test_a_delta_is_never_broadcast_to_the_state() -> None:
    with pytest.raises(ParameterError, match=r"w \(1,\) instead of \(3,\)"):
        FedAvg().aggregate(State({"w": torch.ones(3)}), {"a": Update({"w": torch.ones(1)}, 1, 1)})
