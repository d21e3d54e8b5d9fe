"""Networks from nnU-Net plans: their outputs, which parameters face the input, and a federation's initial values."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import nn

from fedcmt.models.scopes import Partition, Scope, ScopeRules, slot_name
from fedcmt.nnunet.fingerprint import Fingerprint
from fedcmt.nnunet.plans import with_sequences
from fedcmt.params import Params, named_tensors, shapes
from fedcmt.randomness import RandomStream


def input_parameters(network: nn.Module) -> frozenset[str]:
    """Names of the weights whose axis 1 counts input channels.

    nnU-Net's architectures and those of `fedcmt.models` declare them as module paths (``keys_to_in_proj``); a path may
    be an alias of the name that ``named_parameters`` gives.
    """
    paths: Sequence[str] = network.keys_to_in_proj  # type: ignore[assignment]
    facing = {id(network.get_submodule(path).weight) for path in paths}
    return frozenset(name for name, parameter in network.named_parameters() if id(parameter) in facing)


def uses_deep_supervision(plans: Mapping[str, Any], configuration: str) -> bool:
    """Whether nnU-Net's trainer takes the loss of these plans' network at several resolutions.

    Args:
      plans: nnU-Net plans.
      configuration: E.g. "3d_fullres".

    Returns:
      False if the plans say so, for a network with one output; False for two resolutions, with one output too, to
      which nnU-Net's deep supervision gives the weight 0 / 0 (2.8.1).
    """
    arch_kwargs = plans["configurations"][configuration]["architecture"]["arch_kwargs"]
    return arch_kwargs.get("deep_supervision", True) and len(arch_kwargs["strides"]) > 2


def build_network(
    plans: Mapping[str, Any], configuration: str, num_inputs: int, labels: Mapping[str, Any]
) -> nn.Module:
    """The network `nnUNetTrainer` would build, initialised from torch's global generator.

    Args:
      plans: nnU-Net plans.
      configuration: E.g. "3d_fullres".
      num_inputs: Input channels.
      labels: ``labels`` and, for regions, ``regions_class_order`` of dataset.json.
    """
    manager = PlansManager(dict(plans))
    config = manager.get_configuration(configuration)
    heads = manager.get_label_manager(dict(labels)).num_segmentation_heads
    return get_network_from_plans(
        config.network_arch_class_name,
        config.network_arch_init_kwargs,
        config.network_arch_init_kwargs_req_import,
        num_inputs,
        heads,
        allow_init=True,
        deep_supervision=uses_deep_supervision(plans, configuration),
    )


def initial_parameters(
    plans: Mapping[str, Mapping[str, Any]],
    fingerprints: Mapping[str, Fingerprint],
    modalities: Mapping[str, str],
    rules: ScopeRules,
    *,
    configuration: str,
    seed: int,
) -> Params:
    """Initial values of every wire tensor: one adapter per modality with a slot for each channel any of its sites has.

    Where shared tensors have one copy per shape, every shape that a site's network has. A tensor that several networks
    have is the first one's; those of the others would differ only in their random draw.

    Args:
      plans: Site to its plans.
      fingerprints: Site to what it sent; also of sites that have their values already.
      modalities: Site to its modality.
      rules: Parameter name to scope.
      configuration: E.g. "3d_fullres".
      seed: Of nnU-Net's own initialisation.

    Raises:
      ValueError: If sites are to average tensors that go by a channel's number and list their channels in other orders.
    """
    initial: Params = {}
    for sites in _of_one_network(plans, modalities, rules):
        channels = _channels_of(sites, fingerprints)
        with RandomStream(seed).active():
            own = with_sequences(dict(plans[sites[0]]), channels, calibrated=False)
            network = build_network(own, configuration, len(channels), fingerprints[sites[0]].dataset_json())
        tensors = named_tensors(network)
        if _averages_by_channel_number(network, rules):
            _check_channel_order(fingerprints, by_count=rules.by_shape and not _numbered_by_channel(network))
        partition = Partition(
            rules,
            shapes(tensors),
            modality=modalities[sites[0]],
            channels=channels,
            input_parameters=input_parameters(network),
        )
        initial = partition.outgoing(tensors) | initial
    return initial


def _averages_by_channel_number(network: nn.Module, rules: ScopeRules) -> bool:
    """Whether sites average tensors that belong to input channels by their number, whatever the channels are."""
    scopes = rules.scopes_of(named_tensors(network))
    of_channels = _numbered_by_channel(network) | input_parameters(network)
    return any(scopes[name] is Scope.SHARED for name in of_channels)


def _numbered_by_channel(network: nn.Module) -> frozenset[str]:
    """Names of the parameters that have a channel's number in their names, as `MUNet` has an encoder for each."""
    prefixes: tuple[str, ...] = getattr(network, "prefixes_by_channel", ())
    return frozenset(name for name in named_tensors(network) if name.startswith(prefixes))


def _check_channel_order(fingerprints: Mapping[str, Fingerprint], *, by_count: bool) -> None:
    """Refuse a channel that has one number at a site and another one at another site.

    Args:
      fingerprints: Site to what it sent.
      by_count: Whether only sites with as many channels average what faces them: others' tensors have other shapes.
    """
    first: dict[tuple[str, int], tuple[str, int]] = {}
    for site in sorted(fingerprints):
        names = fingerprints[site].channel_names
        for number, channel in enumerate(names):
            alike = (slot_name(channel), len(names) if by_count else 0)
            other, expected = first.setdefault(alike, (site, number))
            if number != expected:
                raise ValueError(
                    f"planning: {channel!r} is channel {number} of site {site!r} and channel {expected} of site "
                    f"{other!r}, but these sites average tensors that go by a channel's number. List the channels in "
                    "the same order in every dataset.json, or use an algorithm with adapters by channel, such as "
                    "fedcmt.algorithms.fedcmt.FedCMT"
                )


def _of_one_network(sites: Collection[str], modalities: Mapping[str, str], rules: ScopeRules) -> list[list[str]]:
    """The sites whose tensors one network stands for: those of a modality, or each alone where shapes may differ."""
    alike: dict[str, list[str]] = {}
    for site in sorted(sites):
        alike.setdefault(site if rules.by_shape else slot_name(modalities[site]), []).append(site)
    return [alike[key] for key in sorted(alike)]


def _channels_of(sites: Sequence[str], fingerprints: Mapping[str, Fingerprint]) -> list[str]:
    """The first site's channels in its order, then those that only later sites have."""
    channels: list[str] = []
    for site in sites:
        channels += [c for c in fingerprints[site].channel_names if slot_name(c) not in map(slot_name, channels)]
    return channels
