"""Anchors at a site: made where nothing is calibrated, put into the network where features are."""

from typing import Any

import pytest
import torch

from fedcmt.algorithms.base import LocalStep
from fedcmt.algorithms.fedmepd_site import AnchorSite
from fedcmt.models.fedmepd import FedMEPDNet
from fedcmt.params import ParameterError, Params

LABELS = torch.zeros(1, 1, 8, 8, 12)
LABELS[..., :5] = 1


def network(calibrated: bool) -> FedMEPDNet:
    torch.manual_seed(0)
    made = FedMEPDNet(
        1,
        2,
        ["T2"],
        n_stages=2,
        features_per_stage=(4, 8),
        calibrated=calibrated,
        anchors_per_class=2,
        heads=(2, 2),
    )
    made.all_outputs = True
    return made.train()


def trained(site: AnchorSite, model: FedMEPDNet, cases: list[str], received: Params | None = None) -> None:
    """A round of one step per case, on other images each, after these anchors have come."""
    site.local_start(model, received or {})
    for number, case in enumerate(cases):
        image = torch.randn(1, 1, 8, 8, 12, generator=torch.Generator().manual_seed(number))
        output = model(image)
        given: dict[str, Any] = {"data": image, "target": LABELS, "output": output, "cases": [case]}
        step = LocalStep(
            network=model,
            logits=output.logits,
            valid=None,
            regions=False,
            teacher=lambda: torch.empty(0),
            received={},
            extras={},
            round_idx=0,
            num_rounds=2,
            **given,
        )
        loss = torch.tensor(3.0)
        assert site.local_loss(loss, step) is loss


def anchors(site: AnchorSite, model: FedMEPDNet) -> Params:
    return site.local_extras(model)


def test_anchors_of_the_cases_seen_leave_a_site_that_is_not_calibrated() -> None:
    site, model = AnchorSite(2, send_anchors=True), network(calibrated=False)
    trained(site, model, ["a", "b", "c"])
    sent = anchors(site, model)
    assert {name: tuple(t.shape) for name, t in sent.items()} == {"anchors.1": (4, 4), "anchors.2": (4, 8)}
    assert "a" in str(site.local_state()[1])
    trained(site, model, [])
    assert anchors(site, model) == {}


def test_a_calibrated_site_takes_anchors_and_sends_none() -> None:
    site, model = AnchorSite(2, send_anchors=True), network(calibrated=True)
    given = {"anchors.1": torch.rand(4, 4), "anchors.2": torch.rand(4, 8)}
    site.local_start(model, given)
    held = dict(model.named_parameters())
    assert all(torch.equal(held[name], tensor) for name, tensor in given.items())
    trained(site, model, ["a"], given)
    assert anchors(site, model) == {}
    with pytest.raises(ParameterError, match="anchors from the fusion site"):
        site.local_start(model, {**given, "anchors.1": torch.rand(6, 4)})


def test_a_calibrated_site_refuses_a_round_without_anchors() -> None:
    with pytest.raises(ParameterError, match=r"no \['anchors.2'\].*network_options.calibrated to false"):
        AnchorSite(2, send_anchors=True).local_start(network(calibrated=True), {"anchors.1": torch.rand(4, 4)})


def test_nothing_is_made_where_anchors_are_off() -> None:
    site, model = AnchorSite(2, send_anchors=False), network(calibrated=False)
    trained(site, model, ["a", "b"])
    assert anchors(site, model) == {}


def test_a_site_that_is_restored_makes_the_same_anchors() -> None:
    one, model = AnchorSite(2, send_anchors=True), network(calibrated=False)
    trained(one, model, ["a", "b", "c"])
    anchors(one, model)
    other = AnchorSite(2, send_anchors=True)
    other.restore_local(*one.local_state())
    for site in (one, other):
        trained(site, model, ["b", "c", "a"])
    first, second = anchors(one, model), anchors(other, model)
    assert all(torch.equal(first[name], second[name]) for name in first)
