"""What every algorithm that a job names must hold to; the job files are the list."""

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fedcmt.algorithms.base import Algorithm, LocalStep, Participant, State, Update
from fedcmt.config import SERVER_CONFIG, build_algorithm, component
from fedcmt.json_file import read_json
from fedcmt.models.scopes import ALL_PERSONAL, Partition
from fedcmt.params import Params, load_tensors, named_tensors, save_tensors, shapes, snapshot

JOBS = Path(__file__).resolve().parents[2] / "jobs"
PERSONALISING = ("FedHCA2",)
"""Algorithms that give every site a model of its own, not a common one; their own tests say what they do to it."""
SITES = {"south": ("MR", ["T1", "FLAIR"], 12), "north": ("MR", ["FLAIR", "T2"], 5), "west": ("CT", ["soft", "bone"], 7)}


OWN_NETWORK = ("FedMEPD",)
"""Algorithms that need a network and roles of their own; their own tests hold them to this contract."""


UNWEIGHTED = ("CoordinateMedian", "TrimmedMean")
"""Algorithms in which every site counts alike and none alone moves anything."""


def named_in_jobs() -> list[str]:
    """Each algorithm that shares something, with its args, once, as JSON."""
    files = sorted(JOBS.glob(f"*/{SERVER_CONFIG}"))
    named = sorted({json.dumps(component(read_json(file), "aggregator", file), sort_keys=True) for file in files})
    shared = [spec for spec in named if build_algorithm(json.loads(spec)).scopes != ALL_PERSONAL]
    return [spec for spec in shared if name_of(spec) not in OWN_NETWORK]


def name_of(spec: str) -> str:
    """The class that a job names."""
    return json.loads(spec)["path"].rpartition(".")[2]


@dataclass
class Setting:
    """An algorithm before round 0 of three sites with stock networks."""

    algorithm: Algorithm
    sites: list[Participant]
    partitions: dict[str, Partition]
    network: nn.Module
    state: State

    def updates(self, delta: Callable[[str, Tensor], Tensor]) -> dict[str, Update]:
        """Each site's update, `delta` of site and received tensor."""
        return {
            site.name: Update(
                {name: delta(site.name, t) for name, t in self.algorithm.payload(self.state, site).tensors.items()},
                num_cases=site.num_cases,
                num_steps=3,
                metrics={"loss": 0.5, "val_dice_received": 0.25},
            )
            for site in self.sites
        }

    def random_updates(self) -> dict[str, Update]:
        """Small random updates, the same at every call."""
        generator = torch.Generator().manual_seed(1)
        return self.updates(lambda site, tensor: 0.1 * torch.randn(tensor.shape, generator=generator))


def same(left: Params, right: Params) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.fixture(params=named_in_jobs(), ids=name_of)
def setting(
    request: pytest.FixtureRequest, unet: Callable[..., nn.Module], first_convolution: dict[str, str]
) -> Setting:
    algorithm = build_algorithm(json.loads(request.param))
    network = unet("plain", channels=2)
    own = snapshot(network)
    partitions = {
        name: Partition(
            algorithm.scopes,
            shapes(own),
            modality=modality,
            channels=channels,
            input_parameters={first_convolution["plain"]},
        )
        for name, (modality, channels, _) in SITES.items()
    }
    initial: Params = {}
    for partition in partitions.values():
        initial |= partition.outgoing(own)
    sites = [
        Participant(name, SITES[name][0], tuple(SITES[name][1]), SITES[name][2], partitions[name].wire_shapes)
        for name in sorted(SITES)
    ]
    return Setting(algorithm, sites, partitions, network, algorithm.init(initial, sites, num_rounds=4))


ONE_MODEL = pytest.mark.parametrize(
    "setting", [spec for spec in named_in_jobs() if name_of(spec) not in PERSONALISING], ids=name_of, indirect=True
)


def test_jobs_name_algorithms() -> None:
    names = {name_of(spec) for spec in named_in_jobs()}
    assert {"FedCMT", *PERSONALISING} <= names


def test_state_keeps_its_names_shapes_and_dtypes(setting: Setting) -> None:
    new = setting.algorithm.aggregate(setting.state, setting.random_updates())
    assert shapes(new.params) == shapes(setting.state.params)
    assert {t.dtype for t in new.params.values()} == {torch.float32}
    assert all(bool(torch.isfinite(t).all()) for t in new.params.values())


def test_aggregating_changes_what_was_sent(setting: Setting) -> None:
    new = setting.algorithm.aggregate(setting.state, setting.random_updates())
    assert not any(torch.equal(new.params[name], tensor) for name, tensor in setting.state.params.items())


def test_aggregating_leaves_its_inputs_alone(setting: Setting) -> None:
    updates = setting.random_updates()
    state_before, updates_before = copy.deepcopy((setting.state, updates))
    setting.algorithm.aggregate(setting.state, updates)
    assert same(setting.state.params, state_before.params)
    assert same(setting.state.memory, state_before.memory)
    assert setting.state.record == state_before.record
    assert all(same(updates[site].delta, updates_before[site].delta) for site in updates)


def test_the_order_of_sites_is_irrelevant(setting: Setting) -> None:
    updates = setting.random_updates()
    forward = setting.algorithm.aggregate(setting.state, updates)
    backward = setting.algorithm.aggregate(setting.state, dict(reversed(updates.items())))
    assert same(forward.params, backward.params)
    assert same(forward.memory, backward.memory)
    assert forward.record == backward.record


@ONE_MODEL
def test_equal_updates_are_taken_as_they_are(setting: Setting) -> None:
    updates = setting.updates(lambda site, tensor: torch.full_like(tensor, 0.25))
    new = setting.algorithm.aggregate(setting.state, updates)
    for name, tensor in setting.state.params.items():
        torch.testing.assert_close(new.params[name], tensor + 0.25)


def test_zero_updates_change_nothing(setting: Setting) -> None:
    new = setting.algorithm.aggregate(setting.state, setting.updates(lambda site, tensor: torch.zeros_like(tensor)))
    for name, tensor in setting.state.params.items():
        torch.testing.assert_close(new.params[name], tensor, rtol=0, atol=1e-7)


def test_zero_updates_leave_every_payload_as_it_was(setting: Setting) -> None:
    new = setting.algorithm.aggregate(setting.state, setting.updates(lambda site, tensor: torch.zeros_like(tensor)))
    for site in setting.sites:
        before, after = (setting.algorithm.payload(state, site).tensors for state in (setting.state, new))
        for name, tensor in before.items():
            torch.testing.assert_close(after[name], tensor, rtol=0, atol=1e-7)


def test_equal_updates_move_every_site_along_them(setting: Setting) -> None:
    new = setting.algorithm.aggregate(
        setting.state, setting.updates(lambda site, tensor: torch.full_like(tensor, 0.25))
    )
    for site in setting.sites:
        before, after = (setting.algorithm.payload(state, site).tensors for state in (setting.state, new))
        for name, tensor in before.items():
            moved = after[name] - tensor
            torch.testing.assert_close(moved, moved.mean().expand_as(moved), rtol=0, atol=1e-6)
            assert moved.mean() > 0.25 - 1e-6


def test_a_payload_is_exactly_what_the_site_exchanges(setting: Setting) -> None:
    for site in setting.sites:
        payload = setting.algorithm.payload(setting.state, site)
        assert shapes(payload.tensors) == site.wire_shapes
        setting.partitions[site.name].incoming(payload.tensors)


@ONE_MODEL
def test_sites_get_what_they_share_alike(setting: Setting) -> None:
    north, south, west = (set(site.wire_shapes) for site in setting.sites)
    new = setting.algorithm.aggregate(setting.state, setting.random_updates())
    payloads = [setting.algorithm.payload(new, site).tensors for site in setting.sites]
    assert north & south & west
    assert all(torch.equal(payloads[0][name], payloads[2][name]) for name in north & west)


def test_a_state_from_disk_goes_on_the_same(setting: Setting, tmp_path: Path) -> None:
    updates = setting.random_updates()
    state = setting.algorithm.aggregate(setting.state, updates)
    parts = {"params": state.params, "memory": state.memory}
    named = {f"{kind}/{n}": t for kind, tensors in parts.items() for n, t in tensors.items()}
    save_tensors(tmp_path / "state", named, {"record": state.record})
    loaded, meta = load_tensors(tmp_path / "state")
    restored = State(
        **{kind: {n.removeprefix(f"{kind}/"): loaded[n] for n in loaded if n.startswith(f"{kind}/")} for kind in parts},
        record=meta["record"],
    )
    went_on, would_have = (setting.algorithm.aggregate(s, updates) for s in (restored, state))
    assert same(went_on.params, would_have.params)
    assert same(went_on.memory, would_have.memory)
    assert went_on.record == would_have.record


@pytest.mark.parametrize("round_idx", [0, 1, 7])
def test_turns_cover_each_site_exactly_once(setting: Setting, round_idx: int) -> None:
    turns = setting.algorithm.turns(round_idx, setting.sites)
    names = sorted(site.name for turn in turns for site in turn)
    assert names == sorted(SITES)


def test_the_local_loss_is_a_finite_scalar_with_gradients(setting: Setting) -> None:
    network, site = setting.network, setting.sites[0]
    received = setting.partitions[site.name].incoming(setting.algorithm.payload(setting.state, site).tensors)
    data = torch.randn(2, 2, 4, 8, 12, generator=torch.Generator().manual_seed(0))
    logits = network(data)
    step = LocalStep(
        network=network,
        data=data,
        logits=logits,
        target=torch.zeros(2, 1, 4, 8, 12),
        valid=torch.ones(2, 4, 8, 12, dtype=torch.bool),
        regions=False,
        teacher=lambda: logits.detach() + 0.1 * data[:, :1],
        received=received,
        extras={},
        round_idx=1,
        num_rounds=3,
    )
    loss = setting.algorithm.local_loss(logits.square().mean(), step)
    gradients = torch.autograd.grad(loss, list(network.parameters()), allow_unused=True)
    assert loss.ndim == 0
    assert bool(torch.isfinite(loss))
    assert any(g is not None and bool(g.abs().max() > 0) for g in gradients)
    assert all(g is None or bool(torch.isfinite(g).all()) for g in gradients)
    assert all(torch.equal(t, named_tensors(network)[n]) for n, t in received.items())


@pytest.mark.parametrize(
    "setting", [spec for spec in named_in_jobs() if name_of(spec) not in UNWEIGHTED], ids=name_of, indirect=True
)
def test_more_cases_never_weigh_less(setting: Setting) -> None:
    def north_after(cases: int) -> float:
        updates = setting.updates(lambda site, tensor: torch.full_like(tensor, 1.0 if site == "north" else 0.0))
        updates["north"] = replace(updates["north"], num_cases=cases)
        new = setting.algorithm.aggregate(setting.state, updates)
        return sum(float((new.params[n] - t).sum()) for n, t in setting.state.params.items())

    assert north_after(500) >= north_after(5) > 0
