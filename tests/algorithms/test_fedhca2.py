"""FedHCA2 on hand-computed sites of two encoder elements and decoders of a few."""

import json
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from fedcmt.algorithms.base import Participant, State, Update
from fedcmt.algorithms.conflict_averse import GramMatrix, rescale, solve
from fedcmt.algorithms.fedhca2 import FedHCA2, attention, hyperweight_gradient, personalised
from fedcmt.models.scopes import Scope
from fedcmt.params import ParameterError, Params, load_tensors, save_tensors

ENCODER = "encoder.stages.0.weight"
WEIGHT, BIAS = "decoder.stages.0.conv.weight", "decoder.stages.0.conv.bias"
NORM = "decoder.stages.0.norm.weight"
LAYERS = ("decoder.stages.0.conv", "decoder.stages.0.norm")
SHAPES = {ENCODER: (2, 3), WEIGHT: (3, 2), BIAS: (3,), NORM: (4,)}
STRETCH = 1.4 / 1.16
"""(1 + c) / (1 + c²) for c = 0.4: what the direction of equal updates is of each."""


def participant(name: str, wire_shapes: Mapping[str, tuple[int, ...]] = SHAPES) -> Participant:
    return Participant(name, "MR", ("T1",), 5, wire_shapes)


def started(algorithm: FedHCA2, sites: str = "ab", initial: Params | None = None) -> State:
    initial = {name: torch.zeros(shape) for name, shape in SHAPES.items()} if initial is None else initial
    wire_shapes = {name: tuple(tensor.shape) for name, tensor in initial.items()}
    return algorithm.init(initial, [participant(site, wire_shapes) for site in sites], 5)


def updates(**deltas: Params) -> dict[str, Update]:
    return {site: Update(delta, 5, 1) for site, delta in deltas.items()}


def random_deltas(seed: int, sites: str = "ab", scale: float = 1.0) -> dict[str, Params]:
    generator = torch.Generator().manual_seed(seed)
    return {s: {n: scale * torch.randn(shape, generator=generator) for n, shape in SHAPES.items()} for s in sites}


def own(state: State, site: str) -> Params:
    prefix = f"site/{site}/"
    return {n.removeprefix(prefix): t for n, t in state.memory.items() if n.startswith(prefix)}


def weights(state: State, site: str) -> dict[str, float]:
    return state.record["sites"][site]["weights"]


def vectors(encoder: list[float], decoder: list[float]) -> Params:
    return {"encoder.w": torch.tensor(encoder), "decoder.l.weight": torch.tensor(decoder)}


def two_sites() -> tuple[FedHCA2, State, State]:
    """Before and after the first round of two sites whose updates are orthogonal."""
    algorithm = FedHCA2()
    state = started(algorithm, initial=vectors([10.0, 20.0], [1.0, 2.0, 3.0, 4.0]))
    sent = updates(a=vectors([1.0, 0.0], [1.0, 0.0, 0.0, 0.0]), b=vectors([0.0, 1.0], [0.0, 2.0, 0.0, 0.0]))
    return algorithm, state, algorithm.aggregate(state, sent)


def test_encoders_and_decoders_travel_and_heads_do_not() -> None:
    names = [ENCODER, WEIGHT, "decoder.transpconvs.0.bias", "decoder.seg_layers.0.weight"]
    scopes = FedHCA2.scopes.scopes_of(names)
    assert list(scopes.values()) == [Scope.SHARED, Scope.SHARED, Scope.SHARED, Scope.PERSONAL]
    assert FedHCA2.scopes.scopes_of(["encoder.w", "head.bias"])["head.bias"] is Scope.PERSONAL


def test_two_sites_by_hand() -> None:
    _, _, new = two_sites()
    # g0 = (0.5, 0.5) and w = (0.5, 0.5), so d = 1.4 g0, and U = d / 1.16 = 0.6034483 in both elements.
    common = 0.7 / 1.16
    assert new.memory["direction/0/encoder.w"].tolist() == pytest.approx([common, common], abs=1e-6)
    assert own(new, "a")["encoder.w"].tolist() == pytest.approx([11 + 0.1 * common, 20 + 0.1 * common], abs=1e-5)
    assert own(new, "b")["encoder.w"].tolist() == pytest.approx([10 + 0.1 * common, 21 + 0.1 * common], abs=1e-5)
    # Logits over sqrt(4): (0.5, 0) for a and (0, 2) for b; softmax (0.6224593, 0.3775407) and (0.1192029, 0.8807971).
    decoder_a = [1 + 1.06224593, 2 + 0.1 * 0.7550813, 3.0, 4.0]
    decoder_b = [1 + 0.01192029, 2 + 2 + 0.1 * 1.7615942, 3.0, 4.0]
    assert own(new, "a")["decoder.l.weight"].tolist() == pytest.approx(decoder_a, abs=1e-5)
    assert own(new, "b")["decoder.l.weight"].tolist() == pytest.approx(decoder_b, abs=1e-5)
    assert weights(new, "a") == {"decoder.l": 0.1, "encoder": 0.1}  # nothing to learn from yet


def test_the_state_s_parameters_are_the_mean_over_sites() -> None:
    _, _, new = two_sites()
    expected = (own(new, "a")["encoder.w"] + own(new, "b")["encoder.w"]) / 2
    torch.testing.assert_close(new.params["encoder.w"], expected)


def test_sites_receive_their_own_models() -> None:
    algorithm, _, new = two_sites()
    shapes = {"encoder.w": (2,), "decoder.l.weight": (4,)}
    for site in "ab":
        assert algorithm.payload(new, participant(site, shapes)).tensors == own(new, site)


def test_the_next_update_is_paired_with_what_the_site_had_been_given() -> None:
    algorithm, _, first = two_sites()
    next_sent = updates(a=vectors([2.0, 1.0], [0.0, 3.0, 0.0, 0.0]), b=vectors([-1.0, 0.0], [1.0, 0.0, 5.0, 0.0]))
    second = algorithm.aggregate(first, next_sent)
    common = 0.7 / 1.16
    # Gradients: a: alpha -(2 + 1) U, beta -3 * 0.7550813; b: alpha +1 U, beta -1 * 0.1192029. Weight decay 1e-4 * 0.1.
    expected = {
        ("a", "encoder"): -3 * common,
        ("a", "decoder.l"): -3 * 0.7550813,
        ("b", "encoder"): common,
        ("b", "decoder.l"): -0.1192029,
    }
    for (site, layer), gradient in expected.items():
        assert weights(second, site)[layer] == pytest.approx(0.1 - 0.01 * (gradient + 1e-5), abs=1e-7)


def test_hyperweights_learn_before_the_new_step_uses_them() -> None:
    algorithm, _, first = two_sites()
    sent = updates(a=vectors([2.0, 1.0], [0.0, 3.0, 0.0, 0.0]), b=vectors([2.0, 1.0], [0.0, 3.0, 0.0, 0.0]))
    second = algorithm.aggregate(first, sent)
    for site in "ab":
        alpha = weights(second, site)["encoder"]
        assert alpha > 0.1
        expected = own(first, site)["encoder.w"] + torch.tensor([2.0, 1.0]) * (1 + alpha * STRETCH)
        torch.testing.assert_close(own(second, site)["encoder.w"], expected)


def test_alpha_rises_where_the_site_goes_on_along_the_direction_and_falls_where_it_turns_back() -> None:
    algorithm, _, first = two_sites()
    along = algorithm.aggregate(first, updates(a=vectors([1.0, 1.0], [0.1] * 4)))
    against = algorithm.aggregate(first, updates(a=vectors([-1.0, -1.0], [0.1] * 4)))
    assert weights(along, "a")["encoder"] > 0.1 > weights(against, "a")["encoder"]


def test_the_second_step_has_momentum_and_weight_decay_as_torch_s_sgd() -> None:
    algorithm = FedHCA2(lr=0.02, momentum=0.5, weight_decay=0.1)
    state = started(algorithm)
    parameter = torch.nn.Parameter(torch.tensor([0.1], dtype=torch.float64))
    optimizer = torch.optim.SGD([parameter], lr=0.02, momentum=0.5, weight_decay=0.1)
    state = algorithm.aggregate(state, updates(**random_deltas(0, scale=0.1)))
    for seed in (1, 2, 3):
        sent, common = random_deltas(seed, scale=0.1), state.memory[f"direction/{seed - 1}/{ENCODER}"]
        parameter.grad = torch.tensor([-float((sent["a"][ENCODER].double() * common.double()).sum())]).double()
        optimizer.step()
        state = algorithm.aggregate(state, updates(**sent))
        assert weights(state, "a")["encoder"] == pytest.approx(parameter.item(), abs=1e-9)


def reference_forward(
    last: Mapping[str, Params], deltas: Mapping[str, Params], raw: Mapping[tuple[str, str], Tensor]
) -> dict[str, Params]:
    """The module's two equations in float64, with the hyperweights as leaves."""
    gram = GramMatrix()
    for site, delta in deltas.items():
        gram.add(site, {ENCODER: delta[ENCODER]})
    coefficients = rescale(solve(gram.matrix(), np.ones(len(deltas)), 0.4).coefficients, 0.4, 1)
    common = sum(v * deltas[s][ENCODER].double() for v, s in zip(coefficients, gram.sites, strict=True))
    new: dict[str, Params] = {}
    for site, delta in deltas.items():
        new[site] = {ENCODER: last[site][ENCODER] + delta[ENCODER] + raw[site, "encoder"].clamp(0, 1) * common}
        for name in (WEIGHT, BIAS, NORM):
            others = torch.stack([deltas[s][name].double().flatten() for s in sorted(deltas)])
            logits = others @ delta[name].double().flatten() / math.sqrt(delta[name].numel())
            attended = (torch.softmax(logits, 0) @ others).reshape(delta[name].shape)
            beta = raw[site, name.rpartition(".")[0]].clamp(0, 1)
            new[site][name] = last[site][name] + delta[name] + beta * attended
    return new


@pytest.mark.parametrize("start", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("seed", range(4))
def test_hyperweight_gradients_agree_with_autograd(seed: int, start: float) -> None:
    algorithm = FedHCA2(start=start, weight_decay=0.0)
    state = started(algorithm, "abc")
    first, following = random_deltas(seed, "abc"), random_deltas(seed + 100, "abc")
    raw = {
        (site, layer): torch.tensor(start, dtype=torch.float64, requires_grad=True)
        for site in "abc"
        for layer in ("encoder", *LAYERS)
    }
    new = reference_forward({site: own(state, site) for site in "abc"}, first, raw)
    stepped = algorithm.aggregate(state, updates(**first))
    for site in "abc":
        for name, tensor in new[site].items():
            torch.testing.assert_close(own(stepped, site)[name].double(), tensor.detach(), rtol=0, atol=1e-5)
            tensor.backward(-following[site][name].double(), retain_graph=True)
    learnt = algorithm.aggregate(stepped, updates(**following))
    for (site, layer), leaf in raw.items():
        # The first buffer of torch's SGD is the gradient itself.
        assert leaf.grad is not None
        assert learnt.record["sites"][site]["momentum"][layer] == pytest.approx(leaf.grad.item(), abs=1e-6)


@pytest.mark.parametrize("weight", [-0.01, 1.01])
def test_outside_the_clamp_the_gradient_is_zero_as_autograd_s(weight: float) -> None:
    leaf = torch.tensor(weight, requires_grad=True)
    last, change, common = (torch.tensor([1.0, 2.0, value]) for value in (3.0, 4.0, 5.0))
    personalised(last, change, common, leaf).backward(torch.ones(3))
    assert leaf.grad is not None
    assert leaf.grad.item() == 0.0
    assert hyperweight_gradient(weight, {"w": change}, {"w": common}) == 0.0
    assert hyperweight_gradient(0.5, {"w": change}, {"w": common}) == -25.0  # -(1 + 4 + 20)


def test_a_hyperweight_that_left_the_range_is_still_decayed_and_carried_on() -> None:
    algorithm = FedHCA2(start=1.0, lr=0.1, momentum=0.5, weight_decay=0.2)
    state = started(algorithm, initial=vectors([0.0], [0.0]))
    same = vectors([1.0], [1.0])
    state = algorithm.aggregate(state, updates(a=same, b=same))
    state = algorithm.aggregate(state, updates(a=same, b=same))
    gradient = -STRETCH + 0.2
    assert weights(state, "a")["encoder"] == pytest.approx(1 - 0.1 * gradient, abs=1e-6)
    before = weights(state, "a")["encoder"]
    assert before > 1
    state = algorithm.aggregate(state, updates(a=same, b=same))
    assert weights(state, "a")["encoder"] == pytest.approx(before - 0.1 * (0.5 * gradient + 0.2 * before), abs=1e-6)


def test_weight_and_bias_of_a_layer_share_a_hyperweight() -> None:
    state = started(FedHCA2())
    assert set(weights(state, "a")) == {"encoder", *LAYERS}
    change = {WEIGHT: torch.tensor([2.0]), BIAS: torch.tensor([3.0])}
    common = {WEIGHT: torch.tensor([5.0]), BIAS: torch.tensor([-1.0])}
    assert hyperweight_gradient(0.1, change, common) == -7.0  # -(2 * 5 - 3 * 1)


def test_cosine_gradients_do_not_depend_on_length() -> None:
    change, common = {"w": torch.tensor([3.0, 4.0])}, {"w": torch.tensor([1.0, 0.0])}
    longer = {"w": 1000 * change["w"]}
    assert hyperweight_gradient(0.1, change, common, cosine=True) == pytest.approx(-0.6)
    assert hyperweight_gradient(0.1, longer, common, cosine=True) == pytest.approx(-0.6)
    assert hyperweight_gradient(0.1, {"w": torch.zeros(2)}, common, cosine=True) == 0.0


def test_oracle_attention_of_a_unit_vector_over_the_axes() -> None:
    taken = attention({"a": torch.tensor([1.0, 0.0]), "b": torch.tensor([0.0, 1.0])})
    assert taken["a"].tolist() == pytest.approx([0.6697615493, 0.3302384507], abs=1e-7)


def test_attention_by_hand() -> None:
    taken = attention({"a": torch.tensor([[1.0, 0.0], [0.0, 0.0]]), "b": torch.tensor([[0.0, 2.0], [0.0, 0.0]])})
    assert taken["a"].flatten().tolist() == pytest.approx([0.6224593, 0.7550813, 0.0, 0.0], abs=1e-6)
    assert taken["b"].flatten().tolist() == pytest.approx([0.1192029, 1.7615942, 0.0, 0.0], abs=1e-6)


def test_cosine_attention_does_not_depend_on_length() -> None:
    # Cosines (1, 0): softmax (0.7310586, 0.2689414), whatever the lengths.
    for scale in (1.0, 1e-3, 1e3):
        taken = attention({"a": scale * torch.tensor([1.0, 0.0]), "b": scale * torch.tensor([0.0, 2.0])}, cosine=True)
        assert (taken["a"] / scale).tolist() == pytest.approx([0.7310586, 2 * 0.2689414], abs=1e-5)
    # A zero vector has the cosine 0 with every other: it takes the mean.
    taken = attention({"a": torch.zeros(2), "b": torch.tensor([4.0, -2.0])}, cosine=True)
    assert taken["a"].tolist() == [2.0, -1.0]


def test_equal_updates_are_stretched_alike() -> None:
    algorithm = FedHCA2()
    state = started(algorithm, "abc")
    delta = {name: torch.full(shape, 0.25) for name, shape in SHAPES.items()}
    new = algorithm.aggregate(state, updates(a=delta, b=delta, c=delta))
    for site in "abc":
        for name, tensor in own(new, site).items():
            factor = 1 + 0.1 * STRETCH if name == ENCODER else 1.1
            torch.testing.assert_close(tensor, torch.full(SHAPES[name], 0.25 * factor))


def test_with_hyperweights_held_at_zero_sites_are_alone() -> None:
    algorithm = FedHCA2(start=0.0, lr=0.0)
    state, deltas = started(algorithm), random_deltas(3)
    for _ in range(2):
        state = algorithm.aggregate(state, updates(**deltas))
    for site in "ab":
        for name, tensor in own(state, site).items():
            torch.testing.assert_close(tensor, 2 * deltas[site][name])


def test_an_absent_site_stays_bit_identical() -> None:
    algorithm = FedHCA2()
    state = started(algorithm, "abc")
    for seed in (1, 2):
        state = algorithm.aggregate(state, updates(**random_deltas(seed, "abc")))
    new = algorithm.aggregate(state, updates(**random_deltas(3, "ac")))
    assert own(new, "b").keys() == own(state, "b").keys() != set()
    assert all(torch.equal(own(new, "b")[name], tensor) for name, tensor in own(state, "b").items())
    assert new.record["sites"]["b"] == state.record["sites"]["b"]
    assert new.record["sites"]["a"] != state.record["sites"]["a"]
    assert not torch.equal(own(new, "a")[ENCODER], own(state, "a")[ENCODER])


def test_a_site_that_was_absent_learns_from_the_direction_it_was_given() -> None:
    algorithm = FedHCA2(weight_decay=0.0)
    state = algorithm.aggregate(started(algorithm), updates(**random_deltas(1)))
    given = state.memory[f"direction/0/{ENCODER}"]
    state = algorithm.aggregate(state, updates(**random_deltas(2, "a")))
    assert {name.split("/")[1] for name in state.memory if name.startswith("direction/")} == {"0", "1"}
    sent = random_deltas(3)
    state = algorithm.aggregate(state, updates(**sent))
    expected = -float((sent["b"][ENCODER].double() * given.double()).sum())
    assert state.record["sites"]["b"]["momentum"]["encoder"] == pytest.approx(expected, abs=1e-6)
    assert {name.split("/")[1] for name in state.memory if name.startswith("direction/")} == {"2"}  # nobody needs 0, 1


def test_homogeneous_sites_share_their_encoders_changes_and_keep_the_direction() -> None:
    deltas = {"a": vectors([2.0, 0.0], [1.0]), "b": vectors([0.0, 4.0], [3.0]), "c": vectors([1.0, 1.0], [5.0])}
    initial = vectors([0.0, 0.0], [0.0])
    results = {}
    for groups in ((), [["b", "a"]]):
        algorithm = FedHCA2(homogeneous=groups)
        results[len(groups)] = algorithm.aggregate(started(algorithm, "abc", initial), updates(**deltas))
    alone, together = results[0], results[1]
    common = alone.memory["direction/0/encoder.w"]
    assert torch.equal(together.memory["direction/0/encoder.w"], common)
    for site in "ab":
        torch.testing.assert_close(own(together, site)["encoder.w"], torch.tensor([1.0, 2.0]) + 0.1 * common)
        assert torch.equal(own(together, site)["decoder.l.weight"], own(alone, site)["decoder.l.weight"])
    assert torch.equal(own(together, "c")["encoder.w"], own(alone, "c")["encoder.w"])


def test_a_homogeneous_site_whose_fellow_is_absent_keeps_its_own_change() -> None:
    deltas, initial = {"a": vectors([2.0, 0.0], [1.0]), "c": vectors([1.0, 1.0], [5.0])}, vectors([0.0, 0.0], [0.0])
    grouped, plain = FedHCA2(homogeneous=[["a", "b"]]), FedHCA2()
    states = [one.aggregate(started(one, "abc", initial), updates(**deltas)) for one in (grouped, plain)]
    assert torch.equal(own(states[0], "a")["encoder.w"], own(states[1], "a")["encoder.w"])


def test_a_site_that_joins_starts_from_the_mean_and_changes_nothing_of_the_others() -> None:
    algorithm = FedHCA2()
    state = algorithm.aggregate(started(algorithm), updates(**random_deltas(1)))
    initial = {name: torch.full(shape, 9.0) for name, shape in SHAPES.items()}
    joined = algorithm.register(state, participant("new"), initial)
    payload = algorithm.payload(joined, participant("new")).tensors
    assert all(torch.equal(payload[name], tensor) for name, tensor in state.params.items())
    assert all(torch.equal(joined.memory[name], tensor) for name, tensor in state.memory.items())
    assert weights(joined, "new") == dict.fromkeys(("encoder", *LAYERS), 0.1)
    assert algorithm.register(joined, participant("new"), initial) is joined  # back again, with what it had
    after = algorithm.aggregate(joined, updates(**random_deltas(2), new=random_deltas(4, "a")["a"]))
    assert weights(after, "new")["encoder"] == 0.1
    assert weights(after, "a")["encoder"] != 0.1


def test_a_state_from_disk_goes_on_the_same_bit_by_bit(tmp_path: Path) -> None:
    algorithm = FedHCA2()
    state = started(algorithm)
    for seed in (1, 2):
        state = algorithm.aggregate(state, updates(**random_deltas(seed)))
    save_tensors(tmp_path / "memory", state.memory, {})
    save_tensors(tmp_path / "params", state.params, {})
    memory, params = (load_tensors(tmp_path / kind)[0] for kind in ("memory", "params"))
    restored = State(params, memory, json.loads(json.dumps(state.record)))
    left, right = (algorithm.aggregate(s, updates(**random_deltas(3))) for s in (state, restored))
    assert left.record == right.record
    assert left.memory.keys() == right.memory.keys()
    assert all(torch.equal(left.memory[name], tensor) for name, tensor in right.memory.items())


def test_the_curves_show_the_hyperweights() -> None:
    _, _, new = two_sites()
    assert new.record["curves"] == {"alpha/a": 0.1, "beta/a": 0.1, "alpha/b": 0.1, "beta/b": 0.1}


def test_updates_that_do_not_fit_are_refused_by_site() -> None:
    algorithm = FedHCA2()
    state, deltas = started(algorithm), random_deltas(1)
    with pytest.raises(ParameterError, match="no update"):
        algorithm.aggregate(state, {})
    with pytest.raises(ParameterError, match=r"update of 'x', known sites are \['a', 'b'\]"):
        algorithm.aggregate(state, updates(x=deltas["a"]))
    with pytest.raises(ParameterError, match=r"update of 'b': 1 parameters missing \[encoder\.stages\.0\.weight\]"):
        algorithm.aggregate(state, updates(a=deltas["a"], b={n: t for n, t in deltas["b"].items() if n != ENCODER}))
    with pytest.raises(ParameterError, match=r"update of 'a': 1 tensors have another shape"):
        algorithm.aggregate(state, updates(a={**deltas["a"], NORM: torch.ones(5)}))


def test_an_update_that_is_not_finite_is_refused_by_site() -> None:
    algorithm, deltas = FedHCA2(), random_deltas(1)
    deltas["b"][ENCODER][0, 1] = float("nan")
    with pytest.raises(ParameterError, match=r"update of 'b': 1 tensors are not finite"):
        algorithm.aggregate(started(algorithm), updates(**deltas))


def test_homogeneous_sites_that_do_not_exist_are_refused() -> None:
    with pytest.raises(ParameterError, match=r"homogeneous names \['x'\]"):
        started(FedHCA2(homogeneous=[["a", "x"]]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"radius": 1.0}, "radius is 1.0, expected in"),
        ({"start": 1.5}, "start is 1.5"),
        ({"lr": -0.1}, "lr is -0.1"),
        ({"momentum": 1.0}, "momentum is 1.0"),
        ({"weight_decay": float("nan")}, "weight_decay is nan"),
        ({"homogeneous": [["a", "b"], ["b"]]}, "homogeneous is .* each site in at most one"),
        ({"homogeneous": ["ab"]}, "homogeneous is"),
        ({"cosine": 1}, "cosine is 1, expected true or false"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"FedHCA2: {message}"):
        FedHCA2(**settings)
