"""Server optimisers on hand-computed steps."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from fedcmt.algorithms.base import State, Update
from fedcmt.algorithms.fedavg import FedAvg
from fedcmt.algorithms.fedopt import FEDCMT_SERVER, FedOpt, ServerOptimizer
from fedcmt.params import ParameterError, Params

SETTINGS = {
    "sgd": ServerOptimizer("sgd", lr=0.5, momentum=0.6),
    "adam": ServerOptimizer("adam", lr=0.1, betas=(0.9, 0.99), tau=0.1),
    "yogi": ServerOptimizer("yogi", lr=0.1, betas=(0.9, 0.99), tau=0.1),
    "adagrad": ServerOptimizer("adagrad", lr=0.1, betas=(0.9, 0.99), tau=0.1),
}


def float64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def updates(**values: float) -> dict[str, Update]:
    """One site's update of one-element tensors."""
    return {"a": Update({name: torch.tensor([v]) for name, v in values.items()}, 1, 1)}


def same_bits(left: Params, right: Params, *names: str) -> bool:
    return all(torch.equal(left[name].view(torch.int32), right[name].view(torch.int32)) for name in names)


def test_sgd_with_momentum_and_cosine_over_500_rounds() -> None:
    params, memory = {"w": float64(0.0)}, {}
    values, buffers, rates = [], [], []
    for round_idx in range(4):
        rates.append(FEDCMT_SERVER.learning_rate(round_idx, 500))
        params, memory = FEDCMT_SERVER.step(params, {"w": float64(1.0)}, memory, round_idx, 500)
        values.append(params["w"].item())
        buffers.append(memory["momentum/w"].item())
    assert rates == pytest.approx([1, 0.9999990130, 0.9999960522, 0.9999911176], abs=1e-10)
    assert buffers == pytest.approx([-1, -1.6, -1.96, -2.176], abs=1e-12)  # of the gradient -d
    assert values == pytest.approx([1, 2.5999984209, 4.5599906832, 6.7359713551], abs=1e-10)


def test_the_cosine_over_10_rounds() -> None:
    expected = [
        1, 0.9975528258, 0.9904508497, 0.9793892626, 0.9654508497, 0.95, 0.9345491503, 0.9206107374, 0.9095491503,
        0.9024471742, 0.9,
    ]  # fmt: skip
    assert [FEDCMT_SERVER.learning_rate(r, 10) for r in range(11)] == pytest.approx(expected, abs=1e-10)
    assert FEDCMT_SERVER.learning_rate(15, 10) == pytest.approx(0.9, abs=1e-12)  # and never rises again


def test_the_floor_is_a_share_of_the_learning_rate() -> None:
    optimizer = ServerOptimizer("sgd", lr=0.2, schedule={"name": "cosine", "floor": 0.5})
    assert [optimizer.learning_rate(r, 2) for r in range(3)] == pytest.approx([0.2, 0.15, 0.1], abs=1e-12)


def test_the_step_is_torch_s_sgd() -> None:
    generator = torch.Generator().manual_seed(0)
    parameter = torch.nn.Parameter(torch.randn(5, generator=generator))
    optimizer = torch.optim.SGD([parameter], lr=0.7, momentum=0.6)
    params, memory = {"w": parameter.detach().clone()}, {}
    for round_idx in range(3):
        direction = torch.randn(5, generator=generator)
        parameter.grad = -direction
        optimizer.step()
        ours = ServerOptimizer("sgd", lr=0.7, momentum=0.6)
        params, memory = ours.step(params, {"w": direction}, memory, round_idx, 3)
        torch.testing.assert_close(params["w"], parameter.detach(), rtol=0, atol=1e-6)


# theta 1, d 0.5, lr 0.1, beta1 0.9, beta2 0.99, tau 0.1: m = 0.05, v starts at 0.01
@pytest.mark.parametrize(
    ("name", "variance", "value"),
    [
        ("adam", 0.0124, 1.0236568485),  # 0.99 * 0.01 + 0.01 * 0.25; 1 + 0.005 / (0.1113552873 + 0.1)
        ("yogi", 0.0125, 1.0236067977),  # 0.01 + 0.01 * 0.25;        1 + 0.005 / (0.1118033989 + 0.1)
        ("adagrad", 0.26, 1.0081980390),  # 0.01 + 0.25;               1 + 0.005 / (0.5099019514 + 0.1)
    ],
)
def test_one_adaptive_step(name: str, variance: float, value: float) -> None:
    params, memory = SETTINGS[name].step({"w": float64(1.0)}, {"w": float64(0.5)}, {}, 0, 10)
    assert memory["momentum/w"].item() == pytest.approx(-0.05, abs=1e-12)
    assert memory["variance/w"].item() == pytest.approx(variance, abs=1e-12)
    assert params["w"].item() == pytest.approx(value, abs=1e-9)


# The second step, d 0.5 again: m = 0.9 * 0.05 + 0.05 = 0.095
@pytest.mark.parametrize(
    ("name", "variance", "change"),
    [
        ("adam", 0.014776, 0.0428784),  # 0.99 * 0.0124 + 0.0025; 0.0095 / (0.1215566 + 0.1)
        ("yogi", 0.015, 0.0427015),  # 0.0125 + 0.0025;        0.0095 / (0.1224745 + 0.1)
        ("adagrad", 0.51, 0.0116687),  # 0.26 + 0.25;            0.0095 / (0.7141428 + 0.1)
    ],
)
def test_a_second_adaptive_step_remembers_the_first(name: str, variance: float, change: float) -> None:
    first, memory = SETTINGS[name].step({"w": float64(1.0)}, {"w": float64(0.5)}, {}, 0, 10)
    second, memory = SETTINGS[name].step(first, {"w": float64(0.5)}, memory, 1, 10)
    assert memory["momentum/w"].item() == pytest.approx(-0.095, abs=1e-12)
    assert memory["variance/w"].item() == pytest.approx(variance, abs=1e-12)
    assert (second["w"] - first["w"]).item() == pytest.approx(change, abs=1e-7)


def test_yogi_lowers_a_variance_above_the_square() -> None:
    _, memory = SETTINGS["yogi"].step({"w": float64(1.0)}, {"w": float64(0.05)}, {}, 0, 10)
    assert memory["variance/w"].item() == pytest.approx(0.009975, abs=1e-12)  # 0.01 - 0.01 * 0.0025


@pytest.mark.parametrize("name", sorted(SETTINGS))
def test_what_is_absent_keeps_its_bits_and_its_buffers(name: str) -> None:
    optimizer = SETTINGS[name]
    # -0.0 and a subnormal change at any arithmetic with them.
    params = {"w": torch.ones(2), "x@ct": torch.tensor([-0.0, 1e-40]), "x@mr": torch.tensor([-0.0, 1e-40])}
    both = {"w": torch.ones(2), "x@ct": torch.tensor([0.1, -0.2])}
    params, memory = optimizer.step(params, both, {"anchor/x": torch.ones(1)}, 0, 10)
    new, later = optimizer.step(params, {"w": torch.ones(2)}, memory, 1, 10)
    kept = [key for key in memory if not key.endswith("/w")]
    assert "momentum/x@ct" in kept
    assert not any(key.endswith("x@mr") for key in later)
    assert same_bits(params, new, "x@ct", "x@mr")
    assert same_bits(memory, later, *kept)
    assert not torch.equal(new["w"], params["w"])
    assert not torch.equal(later["momentum/w"], memory["momentum/w"])


@pytest.mark.parametrize("name", sorted(SETTINGS))
def test_inputs_stay_as_they_are(name: str) -> None:
    params, direction = {"w": torch.ones(2)}, {"w": torch.tensor([0.3, -0.1])}
    params, memory = SETTINGS[name].step(params, direction, {}, 0, 10)
    before = copy.deepcopy((params, direction, memory))
    new, later = SETTINGS[name].step(params, direction, memory, 1, 10)
    for tensor in [*new.values(), *later.values()]:
        tensor.fill_(7.0)
    for ours, theirs in zip((params, direction, memory), before, strict=True):
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_plain_sgd_at_rate_1_is_fedavg_to_the_bit() -> None:
    generator = torch.Generator().manual_seed(2)
    state = State({"w": torch.randn(999, generator=generator)})
    sent = {
        site: Update({"w": torch.randn(999, generator=generator)}, num_cases=n, num_steps=1)
        for site, n in (("a", 3), ("b", 11))
    }
    algorithm = FedOpt({"name": "sgd", "lr": 1.0})
    ours = algorithm.aggregate(algorithm.init(state.params, [], 5), sent)
    assert torch.equal(ours.params["w"], FedAvg().aggregate(state, sent).params["w"])
    assert ours.memory == {}


def test_rounds_are_counted_in_the_state() -> None:
    algorithm = FedOpt(optimizer={"name": "sgd", "lr": 1, "schedule": {"name": "cosine", "floor": 0.0}})
    state = algorithm.init({"w": torch.zeros(1)}, [], 2)
    values = []
    for round_idx in range(3):
        assert state.record == {"round": round_idx, "num_rounds": 2}
        # A resumed job has nothing but its state.
        algorithm = FedOpt({"name": "sgd", "lr": 1, "schedule": {"name": "cosine", "floor": 0.0}})
        state = algorithm.aggregate(state, updates(w=8.0))
        values.append(state.params["w"].item())
    assert values == pytest.approx([8, 12, 12])  # at rates 1, 0.5 and 0


def test_other_records_are_carried_along() -> None:
    state = State({"w": torch.zeros(1)}, record={"round": 3, "num_rounds": 5, "k": [1]})
    assert FedOpt().aggregate(state, updates(w=1.0)).record == {"round": 4, "num_rounds": 5, "k": [1]}


def test_the_mean_weighs_by_cases_before_the_optimiser() -> None:
    sent = {
        "a": Update({"w": torch.tensor([4.0])}, num_cases=1, num_steps=1),
        "b": Update({"w": torch.tensor([0.0])}, num_cases=3, num_steps=1),
    }
    algorithm = FedOpt()
    state = algorithm.aggregate(algorithm.init({"w": torch.zeros(1)}, [], 500), sent)
    assert state.params["w"].tolist() == [1.0]
    state = algorithm.aggregate(state, sent)
    assert state.params["w"].item() == pytest.approx(2.5999984209, abs=1e-6)


def test_a_direction_is_never_broadcast_or_invented() -> None:
    with pytest.raises(ParameterError, match=r"w \(1,\) instead of \(3,\)"):
        FEDCMT_SERVER.step({"w": torch.ones(3)}, {"w": torch.ones(1)}, {}, 0, 1)
    with pytest.raises(ParameterError, match=r"1 unknown \[v\]"):
        FEDCMT_SERVER.step({"w": torch.ones(1)}, {"v": torch.ones(1)}, {}, 0, 1)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "lamb", "lr": 1.0}, "name is 'lamb'"),
        ({"name": "sgd", "lr": 0}, "lr is 0"),
        ({"name": "sgd", "lr": True}, "lr is True"),
        ({"name": "sgd", "lr": float("nan")}, "lr is nan"),
        ({"name": "sgd", "lr": 1, "momentum": 1.0}, r"momentum is 1\.0"),
        ({"name": "adam", "lr": 1, "momentum": 0.9}, r"momentum is 0\.9, expected 0 for adam"),
        ({"name": "adam", "lr": 1, "betas": [0.9]}, r"betas is \[0\.9\]"),
        ({"name": "adam", "lr": 1, "betas": [0.9, 1.0]}, "betas is"),
        ({"name": "adam", "lr": 1, "tau": 0}, "tau is 0"),
        ({"name": "sgd", "lr": 1, "schedule": {"name": "poly"}}, "schedule is"),
        ({"name": "sgd", "lr": 1, "schedule": {"name": "cosine"}}, "schedule is"),
        ({"name": "sgd", "lr": 1, "schedule": {"name": "cosine", "floor": 1.5}}, "schedule is"),
        ({"name": "sgd", "lr": 1, "schedule": {"name": "constant", "floor": 0.9}}, "schedule is"),
    ],
)
def test_settings_out_of_range_are_refused_by_name(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FedOpt(values)


def test_unknown_and_missing_settings_are_refused() -> None:
    with pytest.raises(TypeError, match=r"unknown keys \['nesterov'\]"):
        FedOpt({"name": "sgd", "lr": 1.0, "nesterov": True})
    with pytest.raises(TypeError, match=r"keys \['lr'\] are missing, with \['name'\] alone; it needs \['lr', 'name'\]"):
        FedOpt({"name": "adam"})


@pytest.mark.parametrize("values", ["sgd", 0, False, ["name", "sgd"]])
def test_what_is_no_object_of_settings_is_refused_as_such(values: Any) -> None:
    with pytest.raises(TypeError, match=r"server optimizer is .*, expected an object with keys of \['betas', 'lr'"):
        FedOpt(values)
