"""FedCMT's server: conflict-averse encoder, adapters by group, adaptive weights, server optimiser."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from fedcmt.algorithms import fedcmt
from fedcmt.algorithms.base import LocalStep, Participant, State, Update
from fedcmt.algorithms.conflict_averse import solve
from fedcmt.algorithms.fedcmt import FedCMT, Granularity
from fedcmt.models.scopes import Scope
from fedcmt.params import Params

PLAIN = {"name": "sgd", "lr": 1.0}
W = "encoder.stages.1.0.convs.0.conv.weight"
V = "encoder.stages.2.0.convs.0.conv.weight"
SLOTS = "encoder.stages.0.0.convs.0.conv.weight"
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
    mr = one((1.0, 0.0), mr=2.0)
    mr = Update({**mr.delta, f"{SLOTS}@mr.t1": torch.tensor([4.0])}, 1, 1)
    first = moved(FedCMT(), {"a": mr, "b": one((0.0, 1.0), ct=3.0)})
    second = FedCMT().aggregate(first, {"b": one((0.0, 1.0), ct=5.0)})
    for name in (f"{ADAPTER}@mr", f"{SLOTS}@mr.t1"):
        assert torch.equal(first.params[name], second.params[name])
        assert torch.equal(first.memory[f"momentum/{name}"], second.memory[f"momentum/{name}"])
    assert not torch.equal(first.params[f"{ADAPTER}@ct"], second.params[f"{ADAPTER}@ct"])


@pytest.mark.parametrize("granularity", ["whole", "stage", "tensor"])
def test_a_zero_update_takes_no_part_in_the_encoder(granularity: Granularity, caplog: pytest.LogCaptureFixture) -> None:
    # With three sites the cap would hold "a" to a half; without "z" they are two, and it does not.
    algorithm = FedCMT(granularity=granularity, optimizer=PLAIN)
    updates = {"a": one((2.0, 0.0), 100), "b": one((0.0, 1.0), 2)}
    without = moved(algorithm, updates, rounds=2)
    assert "left out" not in caplog.text
    with_zero = moved(algorithm, {**updates, "z": one((0.0, 0.0), 3)}, rounds=2)
    assert "zero updates left out: ['z']" in caplog.text
    assert encoder(with_zero) == encoder(without)
    assert with_zero.record["agreement"] == without.record["agreement"]


def test_a_direction_that_could_not_be_solved_is_pointed_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    updates = {"a": one((2.0, 0.0)), "b": one((0.0, 1.0))}
    moved(FedCMT(), updates)
    assert "relative gap" not in caplog.text
    monkeypatch.setattr(fedcmt, "solve", lambda *args, **more: replace(solve(*args, **more), gap=2e-6))
    moved(FedCMT(), updates)
    assert "direction of the encoder: relative gap 2.0e-06 to the best" in caplog.text


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


def weights(algorithm: FedCMT, cases: tuple[int, ...]) -> list[float]:
    """The sites' weights in the first round."""
    axes = torch.eye(len(cases)).tolist()
    updates = {f"site{i}": one(tuple(axes[i]), number) for i, number in enumerate(cases)}
    curves = moved(algorithm, updates).record["curves"]
    return [curves[f"weight/site{i}"] for i in range(len(cases))]


def test_the_floor_holds_before_all_weights_are_scaled_to_sum_to_one() -> None:
    # 1 of 2001 is raised to 0.2 / 3 = 1/15; then all are divided by 2000/2001 + 1/15 = 1.0661669.
    assert weights(FedCMT(optimizer=PLAIN), (1000, 1000, 1)) == pytest.approx([0.4687352, 0.4687352, 0.0625293])


def test_a_site_beside_which_the_others_vanish_still_leaves_them_their_half() -> None:
    # (100 / 2)^10 = 9.8e16 times the weight of the others: 1 in float64, whose rest is 0.
    algorithm = FedCMT(case_exponent=10, optimizer=PLAIN)
    assert weights(algorithm, (100, 2, 2)) == pytest.approx([1 / 2, 1 / 4, 1 / 4])


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
        {"case_exponent": -1}, {"case_exponent": 11}, {"agreement_exponent": -0.1}, {"adaptive_radius": 1.0},
        {"largest_share": 0.4}, {"smallest_share": 1.1}, {"adapters": "shared"},
    ],
)  # fmt: skip
def test_settings_out_of_range_are_named(bad: dict) -> None:
    with pytest.raises(ValueError, match=f"FedCMT: {next(iter(bad))} is"):
        FedCMT(**bad)


def participant(name: str, modality: str, *wires: str) -> Participant:
    return Participant(name, modality, ("x",), 4, dict.fromkeys(wires, (1,)))


def founded() -> State:
    """Two MR founders after one round, with slots t1 and t2."""
    slots = {f"{SLOTS}@mr.t1": torch.tensor([2.0]), f"{SLOTS}@mr.t2": torch.tensor([4.0])}
    sites = [participant(name, "MR", W, *slots) for name in ("a", "b")]
    state = FedCMT().init({W: torch.tensor([0.0]), **slots}, sites, num_rounds=10)
    return FedCMT().aggregate(state, {s.name: update_of(s) for s in sites})


def update_of(site: Participant, *without: str) -> Update:
    return Update({name: torch.ones(1) for name in site.wire_shapes if name not in without}, site.num_cases, 1)


def test_a_new_modality_starts_from_its_own_initial_adapter() -> None:
    newcomer = participant("c", "CT", W, f"{SLOTS}@ct.hu")
    state = FedCMT().register(founded(), newcomer, {W: torch.tensor([9.0]), f"{SLOTS}@ct.hu": torch.tensor([7.0])})
    assert state.params[f"{SLOTS}@ct.hu"].item() == 7.0
    assert state.params[W].item() != 9.0  # the encoder is the federation's


def test_a_new_slot_starts_as_the_mean_of_its_modality_s() -> None:
    before = founded()
    newcomer = participant("c", "MR", W, f"{SLOTS}@mr.t1", f"{SLOTS}@mr.adc")
    initial = {name: torch.tensor([9.0]) for name in newcomer.wire_shapes}
    state = FedCMT().register(before, newcomer, initial)
    expected = (before.params[f"{SLOTS}@mr.t1"] + before.params[f"{SLOTS}@mr.t2"]) / 2
    assert torch.equal(state.params[f"{SLOTS}@mr.adc"], expected)
    assert all(torch.equal(state.params[name], tensor) for name, tensor in before.params.items())


def test_registering_changes_nobody_else_s_state() -> None:
    before = founded()
    newcomer = participant("c", "CT", W, f"{SLOTS}@ct.hu")
    state = FedCMT().register(before, newcomer, {W: torch.tensor([9.0]), f"{SLOTS}@ct.hu": torch.tensor([7.0])})
    assert all(torch.equal(state.params[name], tensor) for name, tensor in before.params.items())
    assert state.memory.keys() == before.memory.keys()
    assert all(torch.equal(state.memory[name], tensor) for name, tensor in before.memory.items())
    unchanged = ("round", "num_rounds", "agreement")
    assert [state.record[key] for key in unchanged] == [before.record[key] for key in unchanged]


def test_in_its_warm_start_a_newcomer_trains_and_sends_only_adapters_that_are_its_own() -> None:
    newcomer = participant("c", "MR", W, f"{SLOTS}@mr.t1", f"{SLOTS}@mr.adc")
    state = FedCMT().register(founded(), newcomer, {name: torch.zeros(1) for name in newcomer.wire_shapes})
    for _ in range(2):
        payload = FedCMT().payload(state, newcomer)
        assert set(payload.tensors) == set(newcomer.wire_shapes)
        assert payload.frozen == {W, f"{SLOTS}@mr.t1"}
        assert not FedCMT().payload(state, participant("a", "MR", W)).frozen
        founder = participant("a", "MR", W, f"{SLOTS}@mr.t1")
        updates = {"a": update_of(founder), "c": update_of(newcomer, *payload.frozen)}
        after = FedCMT().aggregate(state, updates)
        alone = FedCMT().aggregate(state, {"a": updates["a"]})
        assert torch.equal(after.params[W], alone.params[W])
        assert not torch.equal(after.params[f"{SLOTS}@mr.adc"], state.params[f"{SLOTS}@mr.adc"])
        state = after
    assert not FedCMT().payload(state, newcomer).frozen


def test_a_newcomer_s_encoder_counts_a_fifth_more_each_round() -> None:
    algorithm = FedCMT(agreement_exponent=0)
    founder, newcomer = participant("a", "MR", W), participant("c", "CT", W)
    state = algorithm.register(algorithm.init({W: torch.zeros(1)}, [founder], 20), newcomer, {W: torch.zeros(1)})
    weights = []
    for round_idx in range(8):
        warm = round_idx < 2
        updates = {"a": update_of(founder), "c": update_of(newcomer, *([W] if warm else []))}
        state = algorithm.aggregate(state, updates)
        weights.append(state.record["curves"].get("weight/c"))
    # Equal cases: share rho / (1 + rho), for rho = 1/5, 2/5, …
    expected = [k / 5 / (1 + k / 5) for k in (1, 2, 3, 4, 5, 5)]
    assert weights == [None, None, *(pytest.approx(w) for w in expected)]


def test_rounds_without_the_newcomer_count_neither_as_its_warm_start_nor_in_its_ramp() -> None:
    algorithm = FedCMT(agreement_exponent=0)
    founder, newcomer = participant("a", "MR", W), participant("c", "CT", W)
    state = algorithm.register(algorithm.init({W: torch.zeros(1)}, [founder], 20), newcomer, {W: torch.zeros(1)})
    alone = {"a": update_of(founder)}
    for left in (2, 1):
        state = algorithm.aggregate(algorithm.aggregate(state, alone), alone)
        assert algorithm.payload(state, newcomer).frozen == {W}, left
        state = algorithm.aggregate(state, {**alone, "c": update_of(newcomer, W)})
    weights = []
    for _ in range(3):
        state = algorithm.aggregate(algorithm.aggregate(state, alone), alone)
        assert not algorithm.payload(state, newcomer).frozen
        state = algorithm.aggregate(state, {**alone, "c": update_of(newcomer)})
        weights.append(state.record["curves"]["weight/c"])
    assert weights == pytest.approx([k / 5 / (1 + k / 5) for k in (1, 2, 3)])


def test_an_adapter_that_a_member_and_a_site_in_its_warm_start_send_is_the_mean_of_both_by_cases() -> None:
    both = [participant(name, "CT", W, f"{SLOTS}@ct.hu") for name in ("c", "d")]
    state = founded()
    for site in both:
        state = FedCMT(optimizer=PLAIN).register(state, site, {name: torch.zeros(1) for name in site.wire_shapes})
    sent = {
        "c": Update({W: torch.ones(1), f"{SLOTS}@ct.hu": torch.tensor([1.0])}, 30, 1),
        "d": Update({f"{SLOTS}@ct.hu": torch.tensor([-9.0])}, 10, 1),
    }
    after = FedCMT(optimizer=PLAIN).aggregate(state, sent)
    assert after.params[f"{SLOTS}@ct.hu"].item() == pytest.approx((30 * 1 + 10 * -9) / 40)


def test_a_round_of_newcomers_alone_leaves_the_encoder_as_it_is() -> None:
    newcomer = participant("c", "CT", W, f"{SLOTS}@ct.hu")
    state = FedCMT().register(founded(), newcomer, {name: torch.zeros(1) for name in newcomer.wire_shapes})
    after = FedCMT().aggregate(state, {"c": update_of(newcomer, W)})
    assert torch.equal(after.params[W], state.params[W])
    assert after.params[f"{SLOTS}@ct.hu"].item() == pytest.approx(0.9975528258)  # the second of ten rounds


def test_the_adaptive_radius_shrinks_with_agreement() -> None:
    alike = moved(FedCMT(adaptive_radius=0.8), {"a": one((1.0, 0.0)), "b": one((2.0, 0.0))})
    across = moved(FedCMT(adaptive_radius=0.8), {"a": one((1.0, 0.0)), "b": one((0.0, 1.0))})
    against = moved(FedCMT(adaptive_radius=0.8), {"a": one((1.0, 0.0)), "b": one((-0.5, 0.0))})
    # Agreement (1 + cos) / 2 of each with the other: 1, 1/2 and 0.
    assert [s.record["curves"]["radius"] for s in (alike, across, against)] == pytest.approx([0.0, 0.4, 0.8])


def test_the_server_s_step_is_logged_with_its_angle_to_every_site() -> None:
    state = moved(FedCMT(radius=0, agreement_exponent=0, optimizer=PLAIN), {"a": one((3.0, 0.0)), "b": one((0.0, 3.0))})
    curves = state.record["curves"]
    assert curves["step_norm"] == pytest.approx(1.5 * math.sqrt(2))
    assert curves["step_cosine/a"] == pytest.approx(math.sqrt(0.5))
    assert curves["cosine/a-b"] == 0


def test_personal_adapters_are_a_switch() -> None:
    name = "encoder.stages.0.0.convs.0.conv.weight"
    assert FedCMT().scopes.scope_of(name) is Scope.GROUP
    assert FedCMT(adapters="personal").scopes.scope_of(name) is Scope.PERSONAL


def local_step(round_idx: int, calls: list[int], **changes: Any) -> LocalStep:
    logits = torch.tensor([[1.0, 1.0, 0.0]], requires_grad=True)

    def teacher() -> torch.Tensor:
        calls.append(round_idx)
        return torch.tensor([[2.0, 0.0, -1.0]])

    given = {
        "network": torch.nn.Identity(), "data": torch.zeros(1, 1, 2, 3, 4), "logits": logits,
        "target": torch.tensor([1]), "valid": None, "regions": False, "teacher": teacher, "received": {}, "extras": {},
        "round_idx": round_idx, "num_rounds": 11,
    }  # fmt: skip
    return LocalStep(**(given | changes))


def test_the_local_loss_adds_the_divergence_from_the_received_model() -> None:
    calls: list[int] = []
    # The spec's pair of logits: KL 0.3797382535; the coefficient is 1 from the last round on.
    loss = FedCMT().local_loss(torch.tensor(2.0), local_step(11, calls))
    assert loss.item() == pytest.approx(2.3797382535, abs=1e-6)
    assert calls == [11]


def test_there_is_no_teacher_in_round_0_nor_without_distillation() -> None:
    calls: list[int] = []
    loss = torch.tensor(2.0)
    assert FedCMT().local_loss(loss, local_step(0, calls)) is loss
    assert FedCMT(distillation={"maximum": 0}).local_loss(loss, local_step(5, calls)) is loss
    assert calls == []
    assert not FedCMT().needs_teacher(0, 11)
    assert FedCMT().needs_teacher(5, 11)
    assert not FedCMT(distillation={"maximum": 0}).needs_teacher(5, 11)


def test_the_gate_trusts_the_teacher_where_it_is_right() -> None:
    algorithm, task = FedCMT(distillation={"gate": True}), torch.tensor(2.0)
    right = algorithm.local_loss(task, local_step(11, [], target=torch.tensor([0])))
    wrong = algorithm.local_loss(task, local_step(11, [], target=torch.tensor([1])))
    assert right.item() == pytest.approx(2.3797382535, abs=1e-6)
    assert wrong.item() == 2.0


def test_without_cap_and_floor_weights_are_those_of_fedavg() -> None:
    algorithm = FedCMT(radius=0, agreement_exponent=0, largest_share=1, smallest_share=0, optimizer=PLAIN)
    cases = {"a": 22, "b": 22, "c": 130, "d": 2}
    state = moved(algorithm, {site: one((1.0, 0.0), n) for site, n in cases.items()})
    weights = [state.record["curves"][f"weight/{site}"] for site in cases]
    assert weights == pytest.approx([n / 176 for n in cases.values()])


def test_a_site_that_left_in_its_warm_start_warms_up_again() -> None:
    newcomer = participant("c", "CT", W, f"{SLOTS}@ct.hu")
    initial = {name: torch.zeros(1) for name in newcomer.wire_shapes}
    state = FedCMT().register(founded(), newcomer, initial)
    state = FedCMT().aggregate(state, {"c": update_of(newcomer, W)})
    state = FedCMT().register(state, newcomer, initial)
    assert FedCMT().payload(state, newcomer).frozen == {W}  # its own adapter trains on
    state = FedCMT().aggregate(state, {"c": update_of(newcomer, W)})
    assert FedCMT().payload(state, newcomer).frozen == {W}
    state = FedCMT().aggregate(state, {"c": update_of(newcomer, W)})
    assert not FedCMT().payload(state, newcomer).frozen


def test_identical_updates_take_the_federation_where_one_site_alone_would_go() -> None:
    # N identical sites, any c, rescale 2, no momentum, rate 1: theta + delta, whatever N.
    for count in (1, 2, 5):
        for radius in (0.0, 0.4, 0.6, 0.95):
            updates = {f"s{i}": one((0.3, -0.7)) for i in range(count)}
            state = moved(FedCMT(radius=radius, optimizer=PLAIN), updates, rounds=3)
            assert encoder(state) == pytest.approx([0.9, -2.1])


def test_on_a_quadratic_toy_the_smallest_decrease_is_at_least_fedavg_s() -> None:
    # f_i = 1/2 |theta - a_i|^2, delta_i = eta (a_i - theta): first-order decreases <delta_i, d>.
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        deltas = [0.1 * torch.randn(2, generator=generator) for _ in range(3)]
        updates = {f"s{i}": one(tuple(delta.tolist())) for i, delta in enumerate(deltas)}
        mean = torch.stack(deltas).mean(0)
        for rescale in (0, 2):
            algorithm = FedCMT(rescale=rescale, agreement_exponent=0, optimizer=PLAIN)
            step = torch.tensor(encoder(moved(algorithm, updates)))
            worst, fedavg = (min(float(delta @ d) for delta in deltas) for d in (step, mean))
            assert worst >= fedavg - 1e-7


def test_the_published_radius_is_the_default() -> None:
    assert FedCMT().radius == 0.4


def test_granularity_weighs_each_block_apart_and_leaves_out_its_zero_updates() -> None:
    # Oracle O4 in one tensor; in the other, site b has not moved, and its 0 must not own the worst case.
    updates = {
        "a": Update({W: torch.tensor([2.0, 0.0]), V: torch.tensor([4.0])}, 1, 1),
        "b": Update({W: torch.tensor([0.0, 1.0]), V: torch.tensor([0.0])}, 1, 1),
    }
    state = moved(FedCMT(radius=0.5, granularity="tensor", optimizer=PLAIN), updates)
    assert encoder(state) == pytest.approx([1 / 1.5, 1.0590169944 / 1.5], abs=1e-6)
    assert state.params[V].item() == pytest.approx(2.0, abs=1e-5)


def test_a_site_agrees_with_the_weighted_mean_of_the_others() -> None:
    # a against (3 b + 1 c) / 4 = (0.75, 0.25): cosine 0.75 / sqrt(0.625); against the plain mean it would be 0.7071.
    updates = {"a": one((1.0, 0.0), 1), "b": one((1.0, 0.0), 3), "c": one((0.0, 1.0), 1)}
    state = moved(FedCMT(optimizer=PLAIN, largest_share=1, smallest_share=0), updates)
    assert state.record["curves"]["agreement/a"] == pytest.approx((1 + 0.75 / math.sqrt(0.625)) / 2)


def test_a_case_exponent_above_one_favours_large_sites() -> None:
    algorithm = FedCMT(case_exponent=2, optimizer=PLAIN, smallest_share=0)
    curves = moved(algorithm, {"a": one((1.0, 0.0), 3), "b": one((0.0, 1.0), 1)}).record["curves"]
    assert (curves["weight/a"], curves["weight/b"]) == pytest.approx((0.9, 0.1))


def test_equalised_a_long_update_does_not_outvote_a_short_one() -> None:
    updates = {"a": one((8.0, 0.0)), "b": one((0.0, 2.0))}
    x, y = encoder(moved(FedCMT(radius=0, normalisation="none", optimizer=PLAIN), updates))
    assert x == pytest.approx(4 * y)
    x, y = encoder(moved(FedCMT(radius=0, normalisation="equalise", optimizer=PLAIN), updates))
    assert x == pytest.approx(y)


def test_in_units_of_its_own_length_a_long_update_gains_no_more_than_a_short_one() -> None:
    """g0 = (2, 1.5) and c ‖g0‖ = 1.25: by <Δ_i, d> = 16 and 3 only b needs help, by 2 and 1.5 soon a does too."""
    updates = {"a": one((8.0, 0.0), 1), "b": one((0.0, 2.0), 3)}
    settings = {"radius": 0.5, "rescale": 0, "smallest_share": 0, "optimizer": PLAIN}
    d = encoder(moved(FedCMT(normalisation="none", **settings), updates))
    assert d == pytest.approx([2, 2.75], abs=1e-6)
    d = encoder(moved(FedCMT(normalisation="unit", **settings), updates))
    u = (math.sqrt(7.36) - 0.8) / 4  # u² + (u + 0.4)² = 1, so that both gain 2 + 1.25 u
    assert d == pytest.approx([2 + 1.25 * u, 2 + 1.25 * u], abs=1e-6)


def test_sites_that_never_agree_keep_their_weights_however_long_that_lasts() -> None:
    """0.5 * 0.9^1000 to the tenth is 0 in float64, and so would be the sum of all shares."""
    updates = {"a": one((1.0, 0.0), 3), "b": one((-1.0, 0.0), 1)}
    algorithm = FedCMT(radius=0, agreement_exponent=10, smallest_share=0, optimizer=PLAIN)
    curves = moved(algorithm, updates, rounds=1000).record["curves"]
    assert (curves["weight/a"], curves["weight/b"]) == pytest.approx((0.75, 0.25))


@pytest.mark.parametrize(("length", "warned"), [(9.0, False), (11.0, True)])
def test_updates_of_very_different_length_are_pointed_out(
    length: float, warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    updates = {"a": one((length, 0.0)), "b": one((0.0, 1.0))}
    assert moved(FedCMT(optimizer=PLAIN), updates).record["curves"]["norm_ratio"] == pytest.approx(length)
    assert ("the longest update is 11 times the shortest" in caplog.text) is warned
