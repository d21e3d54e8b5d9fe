"""FedCMT's server: conflict-averse encoder, adapters by group, adaptive weights, server optimiser."""

import math

import pytest
import torch

from fedcmt.algorithms.base import State, Update
from fedcmt.algorithms.fedcmt import FedCMT
from fedcmt.params import Params

PLAIN = {"name": "sgd", "lr": 1.0}
W = "encoder.stages.1.0.convs.0.conv.weight"
V = "encoder.stages.2.0.convs.0.conv.weight"
ADAPTER = "encoder.stages.0.0.convs.0.conv.bias"


def one(values: tuple[float, ...], cases: int = 1, **groups: float) -> Update:
    """An update of the encoder tensor W, and of adapters by modality."""
    tensors = {W: torch.tensor(values)} | {f"{ADAPTER}@{m}": torch.tensor([x]) for m, x in groups.items()}
    return Update(tensors, cases, 1)


def moved(algorithm: FedCMT, updates: dict[str, Update], rounds: int = 1) -> State:
    """The state after some rounds from zero."""
    names = {name: tensor for update in updates.values() for name, tensor in update.delta.items()}
    state = algorithm.init({n: torch.zeros_like(t) for n, t in names.items()}, [], num_rounds=10)
    for _ in range(rounds):
        state = algorithm.aggregate(state, updates)
    return state


def encoder(state: State) -> list[float]:
    return state.params[W].tolist()


def test_without_radius_momentum_and_adaptive_weights_it_is_the_mean_by_cases() -> None:
    algorithm = FedCMT(radius=0, agreement_exponent=0, optimizer=PLAIN)
    # (3 * 4 + 1 * 0) / 4 and (3 * 0 + 1 * 8) / 4
    assert encoder(moved(algorithm, {"a": one((4.0, 0.0), 3), "b": one((0.0, 8.0), 1)})) == [3.0, 2.0]


def test_the_site_that_gains_least_decides_the_direction() -> None:
    # Oracle O4 at c = 0.5 before rescaling: d = (1, 1.0590169944); rescale 2 divides by 1.5.
    algorithm = FedCMT(radius=0.5, optimizer=PLAIN)
    expected = [1 / 1.5, 1.0590169944 / 1.5]
    assert encoder(moved(algorithm, {"a": one((2.0, 0.0)), "b": one((0.0, 1.0))})) == pytest.approx(expected, abs=1e-6)


def test_adapters_are_means_over_their_group_and_take_no_part_in_conflicts() -> None:
    updates = {"a": one((1.0, 0.0), mr=2.0), "b": one((1.0, 0.0), mr=4.0), "c": one((1.0, 0.0), ct=-100.0)}
    state = moved(FedCMT(optimizer=PLAIN), updates)
    assert encoder(state) == pytest.approx([1.0, 0.0])
    assert state.params[f"{ADAPTER}@mr"].item() == pytest.approx(3.0)
    assert state.params[f"{ADAPTER}@ct"].item() == pytest.approx(-100.0)


def test_a_ct_update_never_changes_an_mr_adapter_nor_its_momentum() -> None:
    first = moved(FedCMT(), {"a": one((1.0, 0.0), mr=2.0), "b": one((0.0, 1.0), ct=3.0)})
    second = FedCMT().aggregate(first, {"b": one((0.0, 1.0), ct=5.0)})
    for name in (f"{ADAPTER}@mr",):
        assert torch.equal(first.params[name], second.params[name])
        assert torch.equal(first.memory[f"momentum/{name}"], second.memory[f"momentum/{name}"])
    assert not torch.equal(first.params[f"{ADAPTER}@ct"], second.params[f"{ADAPTER}@ct"])


def test_a_zero_update_takes_no_part_in_the_encoder() -> None:
    algorithm = FedCMT(agreement_exponent=0, optimizer=PLAIN)
    with_zero = moved(algorithm, {"a": one((2.0, 0.0)), "b": one((0.0, 1.0)), "z": one((0.0, 0.0))})
    without = moved(algorithm, {"a": one((2.0, 0.0)), "b": one((0.0, 1.0))})
    assert encoder(with_zero) == pytest.approx(encoder(without))


def test_published_momentum_carries_over_rounds() -> None:
    # Spec 4.4, direction 1 and R = 500: 1, then 2.5999984209.
    algorithm = FedCMT()
    state = algorithm.init({W: torch.zeros(1)}, [], num_rounds=500)
    seen = []
    for _ in range(2):
        state = algorithm.aggregate(state, {"a": one((1.0,))})
        seen.append(state.params[W].item())
    assert seen == pytest.approx([1.0, 2.5999984209], abs=1e-6)


def test_agreement_is_an_average_over_rounds_that_starts_at_a_half() -> None:
    # Two opposite updates agree by 0: 0.9 * 0.5 + 0.1 * 0, then once more.
    updates = {"a": one((1.0, 0.0)), "b": one((-1.0, 0.0))}
    record = moved(FedCMT(optimizer=PLAIN), updates, rounds=2).record
    assert record["agreement"] == {"a": pytest.approx(0.405), "b": pytest.approx(0.405)}
    assert record["round"] == 2


def test_an_absent_site_s_agreement_stays() -> None:
    state = moved(FedCMT(optimizer=PLAIN), {"a": one((1.0, 0.0)), "b": one((0.0, 1.0))})
    after = FedCMT(optimizer=PLAIN).aggregate(state, {"a": one((1.0, 0.0))})
    assert after.record["agreement"]["b"] == state.record["agreement"]["b"]
    assert after.record["agreement"]["a"] != state.record["agreement"]["a"]


def test_a_dissenting_site_loses_weight() -> None:
    updates = {"a": one((1.0, 0.1)), "b": one((1.0, -0.1)), "x": one((-1.0, 0.0))}
    fixed = moved(FedCMT(radius=0, agreement_exponent=0, optimizer=PLAIN), updates, rounds=20)
    adaptive = moved(FedCMT(radius=0, optimizer=PLAIN), updates, rounds=20)
    assert encoder(adaptive)[0] > encoder(fixed)[0]


@pytest.mark.parametrize(
    ("cases", "expected"),
    [
        # 100 of 103 is cut to a half; the others share the rest as 1 to 2.
        ((100, 1, 2), (1 / 2, 1 / 6, 1 / 3)),
        ((3, 1), (0.75, 0.25)),
        ((99, 1), (0.99 / 1.09, 0.1 / 1.09)),
    ],
)
def test_no_site_owns_the_mean_and_none_is_forgotten(cases: tuple[int, ...], expected: tuple[float, ...]) -> None:
    axes = torch.eye(len(cases)).tolist()
    updates = {f"site{i}": one(tuple(axes[i]), number) for i, number in enumerate(cases)}
    state = moved(FedCMT(radius=0, optimizer=PLAIN), updates)
    assert encoder(state) == pytest.approx(expected, abs=2e-3)


def test_blocks_are_weighed_on_their_own() -> None:
    def both(w: float, v: float) -> Update:
        return Update({W: torch.tensor([w, 0.0]), V: torch.tensor([v, 1.0])}, 1, 1)

    updates = {"a": both(2.0, -1.0), "b": both(-1.0, 2.0)}
    algorithms = [FedCMT(granularity=g, optimizer=PLAIN) for g in ("whole", "stage", "tensor")]  # type: ignore[arg-type]
    results: list[Params] = [moved(algorithm, updates).params for algorithm in algorithms]
    assert torch.allclose(results[1][W], results[2][W])
    assert not torch.allclose(results[0][W], results[1][W])
    # Within its own block, each tensor's worst site is never worse off than under the mean.
    assert min(2 * results[1][W][0].item(), -1 * results[1][W][0].item()) >= -0.5 - 1e-6


@pytest.mark.parametrize(
    "bad",
    [
        {"radius": 1.0}, {"radius": math.nan}, {"rescale": 3}, {"granularity": "layer"}, {"normalisation": "l2"},
        {"case_exponent": -1}, {"agreement_exponent": -0.1},
    ],
)  # fmt: skip
def test_settings_out_of_range_are_named(bad: dict) -> None:
    with pytest.raises(ValueError, match=f"FedCMT: {next(iter(bad))} is"):
        FedCMT(**bad)
