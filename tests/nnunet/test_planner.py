"""The server's planning: what sites that join get, and initial values for networks that differ."""

from collections.abc import Collection
from typing import Any

import pytest
import torch

from fedcmt.algorithms.asymmetric import AsymmetricFedAvg
from fedcmt.models.scopes import ADAPTER_ENCODER_DECODER, ALL_PERSONAL, ALL_SHARED, Partition, ScopeRules
from fedcmt.nnunet.fingerprint import bin_policy, extract_fingerprint
from fedcmt.nnunet.network import build_network, input_parameters
from fedcmt.nnunet.planner import FederatedPlanner
from fedcmt.params import ParameterError, Params, named_tensors, shapes
from tests.nnunet.tiny_data import geometries, write_dataset

MODALITIES = {"small": "MR", "thick": "MR", "wide": "MR"}
CHANNELS = {"small": ["T1"], "thick": ["T1"], "wide": ["T1", "FLAIR"]}
FIRST = "encoder.stages.0.0.convs.0.conv.weight"


def planner(mode: str, network: str = "plan") -> FederatedPlanner:
    return FederatedPlanner({"mode": mode, "network": network, "base_features": 4, "max_features": 16}, seed=7)


@pytest.fixture(scope="module")
def fingerprints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    """A small volume, one of thick slices, and a larger one of two channels."""
    raw, found = tmp_path_factory.mktemp("raw"), {}
    for number, (site, shape, spacing) in enumerate(
        [
            ("small", (18, 20, 22), (1.0, 1.0, 1.0)),
            ("thick", (14, 60, 54), (5.0, 0.8, 0.8)),
            ("wide", (34, 44, 50), (1.0, 1.1, 0.9)),
        ],
        start=1,
    ):
        folder = raw / f"Dataset00{number}_{site}"
        write_dataset(folder, geometries(2, shape, spacing), channels=CHANNELS[site])
        policy = bin_policy("own")
        found[site] = extract_fingerprint(
            folder,
            spacing_step_mm=policy.spacing_step_mm,
            shape_step_vox=policy.shape_step_vox,
            crop_bins=policy.crop_bins,
            min_cases=1,
        ).to_dict()
    return found


def stages(plans: dict) -> int:
    return plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]["n_stages"]


def labels(fingerprint: dict) -> dict[str, Any]:
    return {"labels": dict(fingerprint["labels"])}


def partition(site: str, plans: dict, fingerprint: dict) -> Partition:
    network = build_network(plans, "3d_fullres", len(CHANNELS[site]), labels(fingerprint))
    rules, own = AsymmetricFedAvg.scopes, shapes(named_tensors(network))
    return Partition(rules, own, modality="MR", channels=CHANNELS[site], input_parameters={FIRST})


@pytest.mark.parametrize("network", ["plan", "UNet3D", "MUNet"])
def test_a_site_that_joins_keeps_its_own_depth_in_own_mode(fingerprints: dict[str, dict], network: str) -> None:
    alone = {site: planner("own", network).plan({site: sent}, {})[site] for site, sent in fingerprints.items()}
    halvings = 1 if network == "MUNet" else 0  # it counts stages from half resolution down
    assert stages(alone["small"]) == 3 - halvings
    assert stages(alone["wide"]) == 4 - halvings
    assert planner("own", network).plan(fingerprints, {"small": alone["small"]}) == alone


@pytest.mark.parametrize("network", ["plan", "UNet3D", "MUNet"])
def test_a_site_that_joins_is_as_deep_as_the_others_in_architecture_mode(
    fingerprints: dict[str, dict], network: str
) -> None:
    known = planner("architecture", network).plan({"small": fingerprints["small"]}, {})
    plans = planner("architecture", network).plan({site: fingerprints[site] for site in ("small", "wide")}, known)
    assert plans["small"] == known["small"]
    assert stages(plans["wide"]) == stages(plans["small"])


def test_a_site_whose_images_are_too_small_to_join_is_told_so(fingerprints: dict[str, dict]) -> None:
    known = planner("architecture").plan({"wide": fingerprints["wide"]}, {})
    expected = r"site 'small' cannot join: its images allow patches of .* and 3 resolution stages.* network has 4"
    with pytest.raises(ValueError, match=expected):
        planner("architecture").plan({site: fingerprints[site] for site in ("small", "wide")}, known)


def test_every_site_can_load_the_initial_model_of_a_munet(fingerprints: dict[str, dict]) -> None:
    sent = {site: fingerprints[site] for site in ("small", "thick")}
    plans = planner("architecture", "MUNet").plan(sent, {})
    initial = planner("architecture", "MUNet").initial(plans, sent, MODALITIES, ADAPTER_ENCODER_DECODER)
    for site in sent:
        network = build_network(plans[site], "3d_fullres", 1, labels(sent[site]))
        split = Partition(
            ADAPTER_ENCODER_DECODER,
            shapes(named_tensors(network)),
            modality="MR",
            channels=CHANNELS[site],
            input_parameters=input_parameters(network),
        )
        assert set(split.incoming(initial)) == {n for n in named_tensors(network) if n.startswith("encoder.")}


@pytest.mark.parametrize(
    ("network", "rules", "refused"),
    [
        ("plan", ALL_SHARED, True),
        ("plan", ADAPTER_ENCODER_DECODER, False),
        ("plan", ALL_PERSONAL, False),
        ("MUNet", ALL_SHARED, True),
        ("MUNet", ADAPTER_ENCODER_DECODER, True),
    ],
)
def test_channels_in_another_order_are_refused_where_tensors_go_by_their_number(
    network: str, rules: ScopeRules, refused: bool, fingerprints: dict[str, dict]
) -> None:
    wide = fingerprints["wide"]
    turned = {**wide, "channel_names": wide["channel_names"][::-1]}
    same, other = {"east": wide, "west": wide}, {"east": wide, "west": turned}
    modalities = dict.fromkeys(same, "MR")
    plans = planner("architecture", network).plan(same, {})

    def initial(sites: Collection[str], sent: dict[str, dict]) -> Params:
        asked = {site: plans[site] for site in sites}
        return planner("architecture", network).initial(asked, sent, modalities, rules)

    assert initial(same, same).keys() == initial(["west"], same).keys()
    for sites in (["east", "west"], ["west"]):  # together, and joining
        if refused:
            expected = r"planning: '.*' is channel 0 of site 'west' and channel 1 of site 'east'"
            with pytest.raises(ValueError, match=expected):
                initial(sites, other)
        else:
            initial(sites, other)


@pytest.mark.parametrize(("network", "few_refused"), [("plan", False), ("MUNet", True)])
def test_averaging_by_shape_needs_one_order_where_shapes_agree(
    network: str, few_refused: bool, fingerprints: dict[str, dict]
) -> None:
    """A first convolution of one channel and one of two have nothing in common; encoders 0 of two M-Unets have."""
    few, many = fingerprints["small"], {**fingerprints["wide"], "channel_names": ["FLAIR", "T1"]}
    turned = {**many, "channel_names": ["T1", "FLAIR"]}

    def initial(sent: dict[str, dict]) -> Params:
        asked = planner("own", network)
        return asked.initial(asked.plan(sent, {}), sent, dict.fromkeys(sent, "MR"), AsymmetricFedAvg.scopes)

    if few_refused:
        with pytest.raises(ValueError, match=r"'T1' is channel 1 of site 'many' and channel 0 of site 'few'"):
            initial({"few": few, "many": many})
    else:
        initial({"few": few, "many": many})
    with pytest.raises(ValueError, match=r"'T1' is channel 0 of site 'turned' and channel 1 of site 'many'"):
        initial({"many": many, "turned": turned})


@pytest.mark.parametrize("mode", ["architecture", "own"])
def test_known_plans_stay_when_nobody_joins(fingerprints: dict[str, dict], mode: str) -> None:
    known = planner(mode).plan({"small": fingerprints["small"]}, {})
    assert planner(mode).plan({"small": fingerprints["small"]}, known) == known


def test_the_initial_model_has_every_shape_of_every_site(fingerprints: dict[str, dict]) -> None:
    plans = planner("own").plan(fingerprints, {})
    initial = planner("own").initial(plans, fingerprints, MODALITIES, AsymmetricFedAvg.scopes)
    wires = {site: partition(site, plans[site], sent).wire_shapes for site, sent in fingerprints.items()}
    assert shapes(initial) == wires["small"] | wires["thick"] | wires["wide"]
    assert {name for name in initial if name.startswith(FIRST)} == {
        f"{FIRST}@4x1x3x3x3",
        f"{FIRST}@4x1x1x3x3",
        f"{FIRST}@4x2x3x3x3",
    }
    shared = set(wires["small"]) & set(wires["thick"]) & set(wires["wide"])
    assert "encoder.stages.2.0.convs.1.conv.weight@16x16x3x3x3" in shared


def test_a_site_that_joins_later_finds_the_values_it_would_have_had(fingerprints: dict[str, dict]) -> None:
    plans = planner("own").plan(fingerprints, {})
    rules = AsymmetricFedAvg.scopes
    together = planner("own").initial(plans, fingerprints, MODALITIES, rules)
    alone = planner("own").initial({"wide": plans["wide"]}, fingerprints, {"wide": "MR"}, rules)
    first = f"{FIRST}@4x2x3x3x3"
    assert torch.equal(alone[first], together[first])


def test_sites_of_unlike_shapes_cannot_share_by_name(fingerprints: dict[str, dict]) -> None:
    plans = planner("own").plan(fingerprints, {})
    initial = planner("own").initial(plans, fingerprints, MODALITIES, ALL_SHARED)
    network = build_network(plans["wide"], "3d_fullres", 2, labels(fingerprints["wide"]))
    split = Partition(
        ALL_SHARED,
        shapes(named_tensors(network)),
        modality="MR",
        channels=CHANNELS["wide"],
        input_parameters={FIRST},
    )
    with pytest.raises(ParameterError, match=r"payload: \d+ parameters missing"):
        split.incoming(initial)
