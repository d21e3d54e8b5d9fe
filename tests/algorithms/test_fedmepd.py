"""FedMEPD's server on encoders of two elements and decoders of a few filters."""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fedcmt.algorithms.base import Participant, State, Update
from fedcmt.algorithms.fedmepd import FedMEPD
from fedcmt.algorithms.filters import convolutions
from fedcmt.models.fedmepd import FedMEPDNet
from fedcmt.models.scopes import Partition, Scope
from fedcmt.params import ParameterError, Params, load_tensors, save_tensors, shapes

SEQUENCES = {"north": ("FLAIR", "T1ce"), "south": ("FLAIR",), "west": ("T1ce",)}
CASES = {"north": 12, "south": 5, "west": 7}
ALL = ("FLAIR", "T1", "T1ce")
DECODER = {"decoder.up.weight": (3, 2), "decoder.up.bias": (3,), "decoder.head.weight": (2, 1, 2)}
FILTERS = {"decoder.head": 2, "decoder.up": 3}
ANCHORS = {"anchors.1": torch.ones(4, 2), "anchors.2": torch.full((4, 3), 2.0)}


def encoder(sequence: str) -> str:
    return f"encoders.{sequence}.weight"


def participant(
    name: str, sequences: Sequence[str], decoder: Mapping[str, tuple[int, ...]] = DECODER, *, role: str = "site"
) -> Participant:
    wire_shapes = {**{encoder(sequence): (2,) for sequence in sequences}, **decoder}
    return Participant(name, "MR", tuple(sequences), CASES.get(name, 20), wire_shapes, role)


def participants(
    decoder: Mapping[str, tuple[int, ...]] = DECODER, sequences: Mapping[str, Sequence[str]] = SEQUENCES
) -> list[Participant]:
    others = [participant(name, own, decoder) for name, own in sequences.items()]
    return [*others, participant("centre", ALL, decoder, role="fusion")]


def started(algorithm: FedMEPD, sites: Sequence[Participant] | None = None, value: float = 0.0) -> State:
    """Before round 0, all tensors of one value."""
    sites = participants() if sites is None else sites
    initial = {name: torch.full(shape, value) for site in sites for name, shape in site.wire_shapes.items()}
    return algorithm.init(initial, sites, 5)


def by_fusion(algorithm: FedMEPD, state: State, delta: Params | float = 0.0) -> State:
    """After a turn of the fusion site, which changes what ``delta`` names, or everything alike."""
    if not isinstance(delta, dict):
        delta = {name: torch.full_like(tensor, delta) for name, tensor in state.params.items()}
    whole = {name: delta.get(name, torch.zeros_like(tensor)) for name, tensor in state.params.items()}
    update = Update(whole, 20, 3, extras=dict(ANCHORS) if algorithm.anchors else {})
    return algorithm.aggregate(state, {"centre": update})


def warmed(algorithm: FedMEPD, sites: Sequence[Participant] | None = None, value: float = 0.0) -> State:
    """After the warm-up round, in which nothing has changed."""
    return by_fusion(algorithm, started(algorithm, sites, value))


def updates(algorithm: FedMEPD, state: State, **deltas: Params | float) -> dict[str, Update]:
    """Updates of sites that change what they name, or all that they have received alike."""
    found = {}
    for name, delta in deltas.items():
        site = participant(name, SEQUENCES.get(name, ALL))
        received = algorithm.payload(state, site).tensors
        if not isinstance(delta, dict):
            delta = {n: torch.full_like(t, delta) for n, t in received.items()}
        whole = {n: delta.get(n, torch.zeros_like(t)) for n, t in received.items()}
        found[name] = Update(whole, CASES.get(name, 20), 3)
    return found


def random_updates(algorithm: FedMEPD, state: State, names: Sequence[str], seed: int = 0) -> dict[str, Update]:
    source = torch.Generator().manual_seed(seed)
    blank = updates(algorithm, state, **dict.fromkeys(names, 0.0))
    return {
        site: replace(
            update,
            delta={n: 0.1 * torch.randn(t.shape, generator=source) for n, t in sorted(update.delta.items())},
            extras=dict(ANCHORS) if site == "centre" else {},
        )
        for site, update in blank.items()
    }


def random_rounds(algorithm: FedMEPD, state: State, count: int, seed: int = 0) -> State:
    for i in range(count):
        others = [site for site in SEQUENCES if site in state.record["sites"]]
        state = algorithm.aggregate(state, random_updates(algorithm, state, others, seed + 2 * i))
        state = algorithm.aggregate(state, random_updates(algorithm, state, ["centre"], seed + 2 * i + 1))
    return state


def with_filters(state: State, site: str, patience: int, weight: float) -> State:
    """The state with all filters of a site set to these."""
    memory = dict(state.memory)
    for convolution, count in FILTERS.items():
        memory[f"patience/{site}/{convolution}"] = torch.full((count,), patience, dtype=torch.int16)
        memory[f"weight/{site}/{convolution}"] = torch.full((count,), weight, dtype=torch.float64)
    return replace(state, memory=memory)


def personal(state: State, site: str) -> set[tuple[str, int]]:
    found = {c: state.memory[f"patience/{site}/{c}"] <= 0 for c in FILTERS}
    return {(c, int(j)) for c, gone in found.items() for j in gone.nonzero().flatten()}


def same(left: Params, right: Params) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def equal(left: State, right: State) -> bool:
    return same(left.params, right.params) and same(left.memory, right.memory) and left.record == right.record


def test_oracle_01_an_encoder_is_the_mean_over_its_holders() -> None:
    algorithm = FedMEPD()
    state = warmed(algorithm, value=50.0)
    sent = updates(
        algorithm,
        state,
        north={encoder("FLAIR"): torch.full((2,), -49.0)},
        south={encoder("FLAIR"): torch.full((2,), -47.0)},
        west={encoder("T1ce"): torch.full((2,), 50.0)},
    )
    new = algorithm.aggregate(state, sent)
    assert new.params[encoder("FLAIR")].tolist() == [2.0, 2.0]
    assert new.params[encoder("T1ce")].tolist() == [75.0, 75.0]
    assert new.params[encoder("T1")].tolist() == [50.0, 50.0]
    assert equal(new, algorithm.aggregate(state, dict(reversed(sent.items()))))


def test_oracle_01_who_does_not_hold_a_sequence_cannot_send_its_encoder() -> None:
    algorithm = FedMEPD()
    state = warmed(algorithm)
    sent = updates(algorithm, state, west=0.0)
    sent["west"].delta[encoder("FLAIR")] = torch.full((2,), 100.0)
    with pytest.raises(ParameterError, match=r"update of 'west'.*1 unknown \[encoders.FLAIR.weight\]"):
        algorithm.aggregate(state, sent)


def test_the_server_s_encoder_may_count_as_one_more_site_s() -> None:
    algorithm = FedMEPD(server_in_encoder_mean=True)
    state = warmed(algorithm, value=50.0)
    new = algorithm.aggregate(
        state,
        updates(
            algorithm,
            state,
            north={encoder("FLAIR"): torch.full((2,), -49.0)},
            south={encoder("FLAIR"): torch.full((2,), -47.0)},
        ),
    )
    assert new.params[encoder("FLAIR")].tolist() == [18.0, 18.0]


@pytest.mark.parametrize(
    ("first", "second", "expected"), [((1, 1.0), (1, 3.0), 2.75), ((0, 0.0), (1, 3.0), 3.1), ((0, 0.0), (0, 0.0), 1.0)]
)
def test_oracle_02_a_filter_is_mixed_from_the_sites_that_share_it(
    first: tuple[int, float], second: tuple[int, float], expected: float
) -> None:
    algorithm = FedMEPD()
    state = with_filters(warmed(algorithm, value=1.0), "north", *first)
    state = with_filters(state, "south", *second)
    new = algorithm.aggregate(state, updates(algorithm, state, north=1.0, south=3.0))
    for name, shape in DECODER.items():
        torch.testing.assert_close(new.params[name], torch.full(shape, expected), rtol=0, atol=1e-6)
        assert expected != 1.0 or torch.equal(new.params[name], state.params[name])


def test_oracle_03_only_ratios_of_weights_matter() -> None:
    algorithm = FedMEPD()
    base = warmed(algorithm)
    found = []
    for scale in (1.0, 40.0):
        state = with_filters(with_filters(base, "north", 10, 0.2 * scale), "south", 10, 0.7 * scale)
        found.append(algorithm.aggregate(state, random_updates(algorithm, state, ["north", "south"])))
    for name in DECODER:
        torch.testing.assert_close(found[0].params[name], found[1].params[name], rtol=0, atol=1e-7)


def test_oracle_03_equal_weights_are_the_plain_mean_whatever_the_cases() -> None:
    algorithm = FedMEPD(server_share=0.0)
    state = warmed(algorithm, value=1.0)
    new = algorithm.aggregate(state, updates(algorithm, state, north=1.0, south=4.0, west=-2.0))
    for name, shape in DECODER.items():
        torch.testing.assert_close(new.params[name], torch.full(shape, 2.0))


def test_oracle_03_sites_that_have_changed_nothing_leave_all_as_it_was() -> None:
    algorithm = FedMEPD()
    state = with_filters(warmed(algorithm, value=0.1), "north", 10, 0.3)
    new = algorithm.aggregate(state, updates(algorithm, state, north=0.0, south=0.0, west=0.0))
    assert same(new.params, state.params)


def merged(local: Tensor, received: Params, rows: Mapping[str, tuple[int, ...]], name: str) -> Tensor:
    """What a site makes of its own tensor and a payload."""
    if name not in rows:
        return received[name]
    result = local.clone()
    if rows[name]:
        result[list(rows[name])] = received[name]
    return result


def test_oracle_04_a_site_receives_the_rows_that_it_shares_and_a_bias_follows_its_filter() -> None:
    algorithm = FedMEPD()
    decoder = {"decoder.up.weight": (2, 1), "decoder.up.bias": (2,)}
    state = warmed(algorithm, participants(decoder))
    params = {"decoder.up.weight": torch.tensor([[1.0], [2.0]]), "decoder.up.bias": torch.tensor([1.0, 2.0])}
    state = replace(state, params={**state.params, **params})
    site = participant("north", SEQUENCES["north"], decoder)
    for federated, expected in (((1, 0), [1.0, 7.0]), ((1, 1), [1.0, 2.0]), ((0, 0), [5.0, 7.0])):
        memory = {**state.memory, "patience/north/decoder.up": torch.tensor(federated, dtype=torch.int16)}
        payload = algorithm.payload(replace(state, memory=memory), site)
        for name in decoder:
            local = torch.tensor([5.0, 7.0]).view(decoder[name])
            assert merged(local, payload.tensors, payload.rows, name).flatten().tolist() == expected
            assert (name in payload.tensors) == any(federated)
            assert payload.rows.get(name) == {(1, 0): (0,), (1, 1): None, (0, 0): ()}[federated]


def test_oracle_04_attention_anchors_and_the_auxiliary_decoder_never_travel() -> None:
    with torch.device("meta"):
        network = FedMEPDNet(2, 4, ["T2", "T1gd"], features_per_stage=(4, 4, 4, 4), calibrated=True)
    scopes = FedMEPD.scopes.scopes_of([name for name, _ in network.named_parameters()])
    travelling = {name.partition(".")[0] for name, scope in scopes.items() if scope is Scope.SHARED}
    staying = {name.partition(".")[0] for name, scope in scopes.items() if scope is Scope.PERSONAL}
    assert travelling == {"encoders", "decoder"}
    assert staying == {"calibration", "anchors", "auxiliary"}


def test_a_network_of_another_kind_is_refused() -> None:
    with pytest.raises(ParameterError, match=r"no scope rule matches parameter 'encoder\.stages\.0\.weight'"):
        FedMEPD.scopes.scopes_of(["encoder.stages.0.weight", "decoder.stages.0.weight"])


def full_round(algorithm: FedMEPD, state: State, change: float, server: float) -> State:
    """All sites change all they have by ``change``, the fusion site by ``server``."""
    state = algorithm.aggregate(state, updates(algorithm, state, **dict.fromkeys(SEQUENCES, change)))
    return by_fusion(algorithm, state, server)


def test_oracle_07_patience_counts_from_the_end_of_pretraining() -> None:
    algorithm = FedMEPD(patience=10, pretrain_rounds=30)
    state = warmed(algorithm)
    for round_idx in range(1, 41):
        assert state.record["round"] == round_idx
        assert personal(state, "north") == set()
        state = full_round(algorithm, state, 1.0, -2.0)
    assert all(len(personal(state, site)) == 5 for site in SEQUENCES)


def test_oracle_07_without_patience_to_begin_with_no_decoder_travels() -> None:
    algorithm = FedMEPD(patience=0)
    state = started(algorithm)
    for site in participants()[:3]:
        payload = algorithm.payload(state, site)
        assert sorted(payload.tensors) == [encoder(sequence) for sequence in SEQUENCES[site.name]]
        assert payload.rows == dict.fromkeys(DECODER, ())
    assert shapes(algorithm.payload(state, participants()[3]).tensors) == shapes(state.params)
    state = full_round(algorithm, by_fusion(algorithm, state), 1.0, 0.5)
    assert all(set(state.params[name].flatten().tolist()) == {0.5} for name in DECODER)
    assert state.params[encoder("T1ce")].tolist() == [1.5, 1.5]
    assert state.record["curves"] == {f"federated_share/{site}": 0.0 for site in SEQUENCES}


def test_patience_null_keeps_the_decoder_shared() -> None:
    algorithm = FedMEPD(patience=None, pretrain_rounds=0)
    state = warmed(algorithm)
    for _ in range(12):
        state = full_round(algorithm, state, 1.0, -2.0)
    assert personal(state, "west") == set()
    assert algorithm.payload(state, participants()[2]).rows == {}
    assert state.memory["weight/west/decoder.up"].max() < 1


def test_oracle_08_weights_after_a_round_by_hand() -> None:
    """north: share 12/24, total server change (1 - 0.3) 1 + 0.3 = 1 against its own 2; west has not answered."""
    algorithm = FedMEPD(pretrain_rounds=0)
    state = warmed(algorithm)
    state = algorithm.aggregate(state, updates(algorithm, state, north=2.0, south=0.0))
    new = by_fusion(algorithm, state, 0.3)
    assert new.memory["weight/north/decoder.up"].tolist() == pytest.approx([0.95 + 0.05 * 12 / 24 * 0.5] * 3)
    assert new.memory["weight/south/decoder.up"].tolist() == pytest.approx([0.95 + 0.05 * 5 / 24 * 1000] * 3)
    assert new.memory["weight/west/decoder.up"].tolist() == [1.0] * 3


def test_what_a_site_gains_by_changing_nothing_can_be_cut_off() -> None:
    algorithm = FedMEPD(pretrain_rounds=0, largest_ratio=2.0)
    state = warmed(algorithm)
    state = algorithm.aggregate(state, updates(algorithm, state, north=2.0, south=0.0))
    new = by_fusion(algorithm, state, 0.3)
    assert new.memory["weight/south/decoder.up"].tolist() == pytest.approx([0.95 + 0.05 * 5 / 24 * 2] * 3)
    assert new.memory["weight/north/decoder.up"].tolist() == pytest.approx([0.95 + 0.05 * 12 / 24 * 0.5] * 3)


def test_a_server_s_change_may_be_its_training_alone() -> None:
    """The server moves against the sites, but by less than they had moved it."""
    seen = {}
    for delta_server in ("total", "train_only"):
        algorithm = FedMEPD(pretrain_rounds=0, delta_server=delta_server)
        new = full_round(algorithm, warmed(algorithm), 1.0, -0.5)
        seen[delta_server] = (int(new.memory["patience/north/decoder.up"][0]), new.record["curves"]["cosine/north"])
    assert seen["total"] == (10, pytest.approx(1))
    assert seen["train_only"] == (9, pytest.approx(-1))


def test_oracle_09_sites_that_change_what_the_server_changes_stay_in_the_federation() -> None:
    algorithm = FedMEPD(patience=1, pretrain_rounds=0)
    state = warmed(algorithm)
    for seed in range(4):
        north = random_updates(algorithm, state, ["north"], seed)["north"].delta
        own = {name: tensor for name, tensor in north.items() if name in DECODER}
        state = algorithm.aggregate(state, updates(algorithm, state, north=own, south=own, west=own))
        state = by_fusion(algorithm, state, own)
    assert all(personal(state, site) == set() for site in SEQUENCES)


def test_oracle_09_all_4092_filters_turn_personal_where_the_server_goes_the_other_way() -> None:
    with torch.device("meta"):
        network = FedMEPDNet(1, 4, ["FLAIR"])
    decoder = {n: tuple(p.shape) for n, p in network.named_parameters() if n.startswith("decoder.")}
    assert sum(convolutions(decoder).values()) == 4092
    algorithm = FedMEPD(patience=1, pretrain_rounds=1)
    state = warmed(algorithm, participants(decoder, {"north": ("FLAIR",)}))
    for gone in (0, 4092):
        state = algorithm.aggregate(state, updates(algorithm, state, north=1.0))
        state = by_fusion(algorithm, state, -1.7)  # the server has moved by 0.7 before: -1 in all
        counts = [int((t == 0).sum()) for n, t in state.memory.items() if n.startswith("patience/north/")]
        assert sum(counts) == gone
    before = state.params
    state = algorithm.aggregate(state, updates(algorithm, state, north=1.0))
    state = by_fusion(algorithm, state, 0.25)
    assert all(torch.equal(state.params[name], before[name] + 0.25) for name in decoder)
    assert state.params[encoder("FLAIR")].tolist() == pytest.approx([2 * (1 - 1.7) + 1.25] * 2)


def test_the_set_of_personal_filters_never_shrinks_and_personal_ones_have_no_weight() -> None:
    algorithm = FedMEPD(patience=2, pretrain_rounds=1)
    state, before = warmed(algorithm), {site: set() for site in SEQUENCES}
    for seed in range(0, 20, 2):
        state = random_rounds(algorithm, state, 1, seed)
        for site in SEQUENCES:
            now = personal(state, site)
            assert now >= before[site]
            before[site] = now
            weights = {
                (c, j): float(state.memory[f"weight/{site}/{c}"][j]) for c, n in FILTERS.items() for j in range(n)
            }
            assert {key for key, weight in weights.items() if weight == 0} == now
    assert any(before.values())
    assert not all(len(gone) == 5 for gone in before.values())


def test_oracle_12_the_fusion_site_s_anchors_replace_the_former_ones_and_go_to_all_others() -> None:
    algorithm = FedMEPD()
    state = started(algorithm)
    assert algorithm.payload(state, participants()[0]).extras == {}
    state = by_fusion(algorithm, state)
    assert same(algorithm.payload(state, participants()[0]).extras, ANCHORS)
    blank = random_updates(algorithm, state, ["centre"])["centre"]
    moved = {name: rows + 5 for name, rows in ANCHORS.items()}
    state = algorithm.aggregate(state, {"centre": replace(blank, extras=moved)})
    payloads = [algorithm.payload(state, site) for site in participants()]
    assert all(same(payload.extras, moved) for payload in payloads[:3])
    assert payloads[3].extras == {}


def test_anchors_can_be_switched_off() -> None:
    algorithm = FedMEPD(anchors=False)
    state = warmed(algorithm)
    assert all(algorithm.payload(state, site).extras == {} for site in participants())


@pytest.mark.parametrize(
    ("switched", "extras", "message"),
    [
        (True, {}, "none, expected anchors.<level> only"),
        (True, {**ANCHORS, "cases": torch.ones(1)}, r"\['cases'\], expected anchors.<level> only"),
        (False, ANCHORS, r"\['anchors.1', 'anchors.2'\], expected none"),
        (True, {**ANCHORS, "anchors.1": torch.full((4, 2), math.nan)}, "not finite"),
        (True, {**ANCHORS, "anchors.1": torch.ones(4, 3)}, "another shape"),
        (True, {"anchors.1": torch.ones(4, 2)}, "missing"),
    ],
)
def test_anchors_that_are_not_due_or_not_there_are_refused(switched: bool, extras: Params, message: str) -> None:
    algorithm = FedMEPD(anchors=switched)
    state = warmed(algorithm)
    update = replace(random_updates(algorithm, state, ["centre"])["centre"], extras=extras)
    with pytest.raises(ParameterError, match=f"extras of fusion site 'centre': .*{message}"):
        algorithm.aggregate(state, {"centre": update})


def test_oracle_26_an_encoder_without_another_holder_is_the_fusion_site_s() -> None:
    algorithm = FedMEPD()
    state = random_rounds(algorithm, warmed(algorithm), 1)
    before = state.params[encoder("T1")]
    state = algorithm.aggregate(state, random_updates(algorithm, state, list(SEQUENCES)))
    assert torch.equal(state.params[encoder("T1")], before)
    update = random_updates(algorithm, state, ["centre"])["centre"]
    state = algorithm.aggregate(state, {"centre": update})
    torch.testing.assert_close(state.params[encoder("T1")], before + update.delta[encoder("T1")])


def test_oracle_26_a_payload_holds_the_site_s_sequences_only_and_shared_encoders_are_equal() -> None:
    algorithm = FedMEPD(patience=1, pretrain_rounds=0)
    state = random_rounds(algorithm, warmed(algorithm), 3)
    payloads = {site.name: algorithm.payload(state, site) for site in participants()}
    for site, own in SEQUENCES.items():
        assert {name for name in payloads[site].tensors if name.startswith("encoders.")} == set(map(encoder, own))
    assert torch.equal(payloads["north"].tensors[encoder("FLAIR")], payloads["south"].tensors[encoder("FLAIR")])
    assert len({str(sorted(payloads[site].rows.items())) for site in SEQUENCES}) > 1
    assert shapes(payloads["centre"].tensors) == shapes(state.params)
    assert payloads["centre"].rows == {}


@pytest.mark.parametrize("half", [False, True], ids=["between rounds", "between turns"])
def test_oracle_26_a_state_from_disk_goes_on_the_same(half: bool, tmp_path: Path) -> None:
    algorithm = FedMEPD(patience=2, pretrain_rounds=0)
    state = random_rounds(algorithm, warmed(algorithm), 3)
    if half:
        state = algorithm.aggregate(state, random_updates(algorithm, state, ["north", "west"], 7))
    parts = {"params": state.params, "memory": state.memory}
    named = {f"{kind}/{n}": t for kind, tensors in parts.items() for n, t in tensors.items()}
    save_tensors(tmp_path / "state", named, {"record": state.record})
    loaded, meta = load_tensors(tmp_path / "state")
    own = {kind: {n.removeprefix(f"{kind}/"): loaded[n] for n in loaded if n.startswith(f"{kind}/")} for kind in parts}
    restored = State(own["params"], own["memory"], meta["record"])
    assert equal(restored, state)
    if half:
        fusion = random_updates(algorithm, state, ["centre"], 8)
        state, restored = (algorithm.aggregate(s, fusion) for s in (state, restored))
    assert equal(*(random_rounds(algorithm, s, 2, seed=20) for s in (state, restored)))
    assert all(algorithm.payload(state, s).rows == algorithm.payload(restored, s).rows for s in participants())


def test_aggregating_leaves_its_inputs_alone() -> None:
    algorithm = FedMEPD(patience=1, pretrain_rounds=0)
    state = random_rounds(algorithm, warmed(algorithm), 2)
    for names in (list(SEQUENCES), ["centre"]):
        sent = random_updates(algorithm, state, names, 9)
        state_before, sent_before = copy.deepcopy((state, sent))
        new = algorithm.aggregate(state, sent)
        assert equal(state, state_before)
        assert all(same(sent[site].delta, sent_before[site].delta) for site in sent)
        state = new


def test_the_order_of_sites_is_irrelevant() -> None:
    algorithm = FedMEPD(patience=2, pretrain_rounds=0)
    forward = started(algorithm)
    backward = started(algorithm, list(reversed(participants())))
    assert equal(forward, backward)
    forward, backward = by_fusion(algorithm, forward), by_fusion(algorithm, backward)
    for seed in range(3):
        sent = random_updates(algorithm, forward, list(SEQUENCES), seed)
        forward = algorithm.aggregate(forward, sent)
        backward = algorithm.aggregate(backward, dict(reversed(sent.items())))
        fusion = random_updates(algorithm, forward, ["centre"], 10 + seed)
        forward, backward = algorithm.aggregate(forward, fusion), algorithm.aggregate(backward, fusion)
        assert equal(forward, backward)


def test_sums_run_in_the_order_of_names_where_rounding_would_tell() -> None:
    algorithm = FedMEPD(server_share=0.0)
    sites = participants(sequences=dict.fromkeys(SEQUENCES, ("FLAIR",)))
    state = warmed(algorithm, sites)
    received = algorithm.payload(state, sites[0]).tensors
    sent = {
        site: Update({name: torch.full_like(tensor, value) for name, tensor in received.items()}, 5, 3)
        for site, value in (("north", 1e16), ("south", -1e16), ("west", 3.0))
    }
    new = algorithm.aggregate(state, dict(reversed(sent.items())))
    assert all(torch.equal(new.params[name], torch.ones_like(new.params[name])) for name in received)


def test_the_state_keeps_its_names_shapes_and_types_and_forgets_the_round() -> None:
    algorithm = FedMEPD(pretrain_rounds=0)
    state = warmed(algorithm)
    middle = algorithm.aggregate(state, random_updates(algorithm, state, list(SEQUENCES)))
    new = algorithm.aggregate(middle, random_updates(algorithm, middle, ["centre"]))
    assert shapes(new.params) == shapes(middle.params) == shapes(state.params)
    assert {t.dtype for t in new.params.values()} == {torch.float32}
    assert shapes(new.memory) == shapes(state.memory)
    assert middle.memory["change/north/decoder.up"].dtype == torch.float32
    assert new.memory["patience/north/decoder.up"].dtype == torch.int16


def test_a_site_that_does_not_answer_keeps_its_filters_and_counts_nowhere() -> None:
    algorithm = FedMEPD(patience=3, pretrain_rounds=0)
    state = random_rounds(algorithm, warmed(algorithm), 2)
    sent = random_updates(algorithm, state, ["north", "south"], 11)
    new = algorithm.aggregate(state, sent)
    mean = sent["north"].delta[encoder("T1ce")]
    torch.testing.assert_close(new.params[encoder("T1ce")], state.params[encoder("T1ce")] + mean)
    new = algorithm.aggregate(new, random_updates(algorithm, new, ["centre"], 12))
    kept = {n: t for n, t in state.memory.items() if "/west/" in n}
    assert same(kept, {n: t for n, t in new.memory.items() if "/west/" in n})
    assert not torch.equal(new.memory["weight/north/decoder.up"], state.memory["weight/north/decoder.up"])
    assert "cosine/west" not in new.record["curves"]
    assert {"cosine/north", "federated_share/west"} <= new.record["curves"].keys()


def test_where_the_fusion_site_does_not_answer_a_round_is_not_counted_and_its_changes_are_forgotten() -> None:
    algorithm = FedMEPD(pretrain_rounds=0)
    state = warmed(algorithm)
    state = algorithm.aggregate(state, updates(algorithm, state, north=1.0, south=1.0))
    state = algorithm.aggregate(state, updates(algorithm, state, west=1.0))
    assert state.record["round"] == 1
    new = by_fusion(algorithm, state, -9.0)
    assert new.record["round"] == 2
    assert new.memory["patience/north/decoder.up"].tolist() == [10] * 3
    assert new.memory["patience/west/decoder.up"].tolist() == [9] * 3


def test_a_round_of_the_fusion_site_alone_leaves_filters_as_they_are() -> None:
    algorithm = FedMEPD(patience=3, pretrain_rounds=0)
    state = random_rounds(algorithm, warmed(algorithm), 2)
    new = by_fusion(algorithm, state, 0.5)
    assert same(new.memory, state.memory)
    torch.testing.assert_close(new.params["decoder.up.bias"], state.params["decoder.up.bias"] + 0.5)


def test_in_pretraining_cosines_are_reported_and_nothing_is_made_of_them() -> None:
    algorithm = FedMEPD(patience=1, pretrain_rounds=2)
    state = warmed(algorithm)
    for _ in (1, 2):
        state = full_round(algorithm, state, 1.0, -2.0)
        assert state.record["curves"]["cosine/north"] == pytest.approx(-1)
        assert state.record["curves"]["federated_share/north"] == 1
        assert state.memory["weight/north/decoder.up"].tolist() == [1.0] * 3
    assert full_round(algorithm, state, 1.0, -2.0).record["curves"]["federated_share/north"] == 0


def test_the_share_of_federated_filters_is_of_filters_not_of_convolutions() -> None:
    algorithm = FedMEPD()
    state = warmed(algorithm)
    memory = {**state.memory, "patience/north/decoder.up": torch.tensor([0, 1, 0], dtype=torch.int16)}
    new = by_fusion(algorithm, replace(state, memory=memory))
    assert new.record["curves"]["federated_share/north"] == pytest.approx(3 / 5)


def test_equal_changes_move_the_server_by_all_but_its_own_share() -> None:
    algorithm = FedMEPD()
    state = warmed(algorithm)
    new = algorithm.aggregate(state, updates(algorithm, state, north=0.5, south=0.5, west=0.5))
    for name, tensor in new.params.items():
        expected = 0.0 if name == encoder("T1") else 0.5 if name.startswith("encoders.") else 0.35
        torch.testing.assert_close(tensor, torch.full_like(tensor, expected))


def test_a_site_that_joins_shares_all_and_changes_nothing_of_the_others() -> None:
    algorithm = FedMEPD(patience=1, pretrain_rounds=0)
    state = random_rounds(algorithm, warmed(algorithm), 3)
    site = participant("east", ("T1", "FLAIR"))
    new = algorithm.register(state, site, {n: torch.full(s, 9.0) for n, s in site.wire_shapes.items()})
    assert same(new.params, state.params)
    assert same(state.memory, {n: t for n, t in new.memory.items() if "/east/" not in n})
    assert new.memory["patience/east/decoder.up"].tolist() == [1] * 3
    assert new.memory["weight/east/decoder.head"].tolist() == [1.0] * 2
    payload = algorithm.payload(new, site)
    assert shapes(payload.tensors) == site.wire_shapes
    assert same(payload.extras, ANCHORS)
    source = torch.Generator().manual_seed(0)
    delta = {n: torch.randn(t.shape, generator=source) for n, t in payload.tensors.items()}
    after = algorithm.aggregate(new, {"east": Update(delta, 20, 3)})
    torch.testing.assert_close(after.params[encoder("T1")], new.params[encoder("T1")] + delta[encoder("T1")])


def test_a_site_that_comes_back_has_kept_its_filters() -> None:
    algorithm = FedMEPD(patience=1, pretrain_rounds=0)
    state = random_rounds(algorithm, warmed(algorithm), 3)
    assert personal(state, "south")
    site = replace(participant("south", SEQUENCES["south"]), num_cases=50)
    new = algorithm.register(state, site, {})
    assert same(new.memory, state.memory)
    assert new.record["sites"]["south"] == {"cases": 50, "sequences": ["FLAIR"]}
    assert equal(algorithm.register(state, participants()[3], {}), state)


def test_a_site_that_has_left_counts_nowhere_and_finds_its_filters_again() -> None:
    algorithm = FedMEPD(patience=1, pretrain_rounds=0)
    state = random_rounds(algorithm, warmed(algorithm), 3)
    gone = algorithm.leave(state, "south")
    assert same(gone.memory, state.memory)
    assert sorted(gone.record["sites"]) == ["north", "west"]
    assert gone.record["left"] == ["south"]
    later = random_rounds(algorithm, gone, 1)
    assert {name.partition("/")[2] for name in later.record["curves"]} == {"north", "west"}
    site = participant("south", SEQUENCES["south"])
    back = algorithm.register(gone, site, {})
    assert same(back.memory, state.memory)
    assert back.record == state.record


def test_shares_of_cases_are_of_the_sites_that_are_there() -> None:
    """As in oracle 8, but without south's five cases: north has 12 of 19."""
    algorithm = FedMEPD(pretrain_rounds=0)
    state = algorithm.leave(warmed(algorithm), "south")
    state = algorithm.aggregate(state, updates(algorithm, state, north=2.0))
    new = by_fusion(algorithm, state, 0.6)
    server = 0.7 * 2 + 0.6  # north alone is the mean of the sites
    assert new.memory["weight/north/decoder.up"].tolist() == pytest.approx([0.95 + 0.05 * 12 / 19 * server / 2] * 3)


def test_the_fusion_site_cannot_leave() -> None:
    algorithm = FedMEPD()
    with pytest.raises(ParameterError, match="fusion site 'centre' cannot leave"):
        algorithm.leave(warmed(algorithm), "centre")


def test_turns_are_the_fusion_site_alone_and_from_then_on_the_others_before_it() -> None:
    algorithm, sites = FedMEPD(), participants()
    assert algorithm.turns(0, sites) == [[sites[3]]]
    for round_idx in (1, 7):
        assert algorithm.turns(round_idx, sites) == [sites[:3], [sites[3]]]
    assert algorithm.turns(1, sites[3:]) == [[sites[3]]]


@pytest.mark.parametrize("fusions", [(), ("centre", "west")])
def test_without_exactly_one_fusion_site_nothing_starts(fusions: Sequence[str]) -> None:
    sites = [replace(site, role="fusion" if site.name in fusions else "site") for site in participants()]
    message = r"of \['centre', 'north', 'south', 'west'\] have the role 'fusion', expected exactly one"
    with pytest.raises(ParameterError, match=message):
        started(FedMEPD(), sites)
    with pytest.raises(ParameterError, match=message):
        FedMEPD().turns(3, sites)


@pytest.mark.parametrize(
    ("site", "message"),
    [
        (participant("east", ALL, role="fusion"), "'east' has the role 'fusion', the fusion site is 'centre'"),
        (participant("centre", ALL), "'centre' has the role 'site', the fusion site is 'centre'"),
        (participant("east", ("T2", "T1")), r"'east' has the sequences \['T2'\], which fusion site 'centre' lacks"),
        (participant("east", ("T1",), {**DECODER, "decoder.up.bias": (4,)}), "of site 'east': 1 tensors have another"),
        (participant("east", ("T1",), {"decoder.up.weight": (3, 2)}), "of site 'east': 0 parameters missing .*unknown"),
        (participant("centre", ("T1",), role="fusion"), "of site 'centre'"),
    ],
)
def test_a_site_that_does_not_fit_the_federation_is_refused(site: Participant, message: str) -> None:
    algorithm = FedMEPD()
    state = warmed(algorithm)
    with pytest.raises(ParameterError, match=message):
        algorithm.register(state, site, {n: torch.zeros(s) for n, s in site.wire_shapes.items()})


def test_a_site_with_half_an_encoder_is_refused() -> None:
    extra = {"encoders.T1.bias": (2,)}
    centre = participant("centre", ALL, {**DECODER, **extra}, role="fusion")
    with pytest.raises(ParameterError, match=r"of site 'north': .*1 unknown \[encoders\.T1\.bias\]"):
        started(FedMEPD(), [participant("north", ("T1",)), centre])


def test_a_decoder_of_more_than_convolutions_is_refused() -> None:
    with pytest.raises(ParameterError, match=r"decoder\.norm\.bias .*made of convolutions alone"):
        started(FedMEPD(), participants({**DECODER, "decoder.norm.bias": (3,)}))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda u: {}, r"updates of \[\], expected those of fusion site 'centre' alone"),
        (lambda u: {**u, "centre": u["north"]}, r"updates of \['centre', 'north', 'south', 'west'\]"),
        (
            lambda u: {"elsewhere": u["north"]},
            r"'elsewhere' is not known, expected one of \['north', 'south', 'west'\]",
        ),
        (lambda u: {"north": replace(u["north"], num_cases=0)}, "update of 'north': num_cases is 0"),
        (
            lambda u: {"south": replace(u["south"], delta={n: t * math.nan for n, t in u["south"].delta.items()})},
            "update of 'south': .*not finite",
        ),
    ],
)
def test_updates_that_cannot_be_used_are_refused_by_site(
    spoil: Callable[[dict[str, Update]], dict[str, Update]], message: str
) -> None:
    algorithm = FedMEPD()
    state = warmed(algorithm)
    sent = random_updates(algorithm, state, list(SEQUENCES))
    with pytest.raises(ParameterError, match=message):
        algorithm.aggregate(state, spoil(sent))


def test_rows_that_are_personal_are_refused() -> None:
    algorithm = FedMEPD()
    state = warmed(algorithm)
    whole = updates(algorithm, state, north=1.0)
    memory = {**state.memory, "patience/north/decoder.up": torch.tensor([0, 1, 0], dtype=torch.int16)}
    with pytest.raises(ParameterError, match=r"update of 'north': 2 tensors .* \(3, 2\) instead of \(1, 2\)"):
        algorithm.aggregate(replace(state, memory=memory), whole)


def test_a_huge_and_a_tiny_change_leave_everything_finite() -> None:
    algorithm = FedMEPD(patience=2, pretrain_rounds=0)
    state = warmed(algorithm)
    for seed in range(3):
        sent = random_updates(algorithm, state, list(SEQUENCES), seed)
        for site, scale in (("north", 1e7), ("south", 1e-30), ("west", 0.0)):
            sent[site] = replace(sent[site], delta={n: scale * t for n, t in sent[site].delta.items()})
        state = by_fusion(algorithm, algorithm.aggregate(state, sent), 1e-6)
    tensors = {**state.params, **state.memory}
    assert all(bool(torch.isfinite(t).all()) for t in tensors.values())
    assert all(math.isfinite(value) for value in state.record["curves"].values())


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("patience", -1),
        ("patience", 2.5),
        ("patience", 40000),
        ("pretrain_rounds", -1),
        ("pretrain_rounds", None),
        ("server_share", 1.1),
        ("smoothing", -0.1),
        ("largest_ratio", 0.5),
        ("delta_server", "both"),
        ("server_in_encoder_mean", 1),
        ("anchors", "no"),
    ],
)
def test_settings_out_of_range_are_refused_by_name(key: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"FedMEPD: {key} is {value!r}, expected"):
        FedMEPD(**{key: value})


def test_a_payload_fits_the_site_s_network_before_anything_is_personal() -> None:
    """Names of the real network, of sites that hold their channels in another order and under other names."""
    algorithm, found = FedMEPD(), []
    networks = {"east": ["t2w", "t1gd"], "centre": ["FLAIR", "T1ce", "T1", "T2"]}
    initial: Params = {}
    for name, channels in networks.items():
        network = FedMEPDNet(len(channels), 4, channels, 2, (4, 4), heads=(1, 1), calibrated=name != "centre")
        own = {n: p.detach() for n, p in network.named_parameters()}
        partition = Partition(
            algorithm.scopes, shapes(own), modality="MR", channels=channels, input_parameters=set[str]()
        )
        initial |= partition.outgoing(own)
        role = "fusion" if name == "centre" else "site"
        found.append(Participant(name, "MR", tuple(channels), 5, partition.wire_shapes, role))
    state = algorithm.init(initial, found, 3)
    for site in found:
        assert shapes(algorithm.payload(state, site).tensors) == site.wire_shapes
    assert state.record["sites"] == {"east": {"cases": 5, "sequences": ["T1ce", "T2"]}}
