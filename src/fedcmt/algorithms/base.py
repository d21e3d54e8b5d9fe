"""The contract of a federated algorithm, on one screen: both halves of it, the server's and the site's.

An algorithm is a rule from parameter names to scopes, how the server combines updates, and at most one extra term in
the local loss. It is pure: it knows tensors by their wire names (see `fedcmt.models.scopes`), not FLARE and not
nnU-Net.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from torch import Tensor, nn

from fedcmt.models.scopes import ScopeRules
from fedcmt.params import Params


@dataclass(frozen=True)
class Participant:
    """What the server knows of a site.

    Attributes:
      name: The site's name in the federation.
      modality: E.g. "MR"; sites of one modality share group tensors.
      channels: nnU-Net channel names in the site's order.
      num_cases: Training cases, after the site's own validation cases are set aside.
      wire_shapes: Wire name to shape of every tensor the site exchanges.
    """

    name: str
    modality: str
    channels: tuple[str, ...]
    num_cases: int
    wire_shapes: Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class State:
    """All the server remembers between rounds; plain data, so that one file resumes a federation.

    Attributes:
      params: Wire name to tensor: the shared tensors and every group's.
      memory: Further tensors of the algorithm (optimiser buffers, anchors).
      record: Plain JSON values of the algorithm, e.g. by site name.
    """

    params: Params
    memory: Params = field(default_factory=dict)
    record: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Payload:
    """What one site receives in a round: its tensors by wire name, and named extras such as anchors."""

    tensors: Params
    extras: Params = field(default_factory=dict)


@dataclass(frozen=True)
class Update:
    """What one site returns.

    Attributes:
      delta: trained - received; the same wire names as the payload.
      num_cases: Training cases of the site.
      num_steps: Optimiser steps taken.
      metrics: Plain numbers, e.g. ``val_dice_received`` in [0, 1].
      extras: Named tensors the algorithm asked for.
    """

    delta: Params
    num_cases: int
    num_steps: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    extras: Params = field(default_factory=dict)


@dataclass(frozen=True)
class LocalStep:
    """One training step as the local loss sees it.

    Attributes:
      network: The site's network in training mode.
      batch: nnU-Net's batch: ``data`` [B, C, X, Y, Z], ``target`` (a list under deep supervision), ``keys`` (case ids).
      output: Logits [B, K, X, Y, Z]; under deep supervision a list, full resolution first.
      received: The round's received tensors by *parameter* name, on the network's device.
      extras: The round's extras as the payload had them.
      round_idx: 0-based round.
    """

    network: nn.Module
    batch: Mapping[str, object]
    output: Tensor | list[Tensor]
    received: Mapping[str, Tensor]
    extras: Mapping[str, Tensor]
    round_idx: int


class Algorithm:
    """Base of all algorithms; a subclass states `scopes` and overrides what its paper changes.

    Attributes:
      scopes: Parameter name to shared, group or personal.
      product: The model a site ends with: ``"received"`` (the aggregate with the site's personal part) or ``"trained"``
        (the site's own model after its last local training).
    """

    scopes: ScopeRules
    product: ClassVar[Literal["received", "trained"]] = "received"

    def init(self, initial: Params, sites: Sequence[Participant], num_rounds: int) -> State:
        """The state before round 0, given initial values of every wire tensor and the length of the job."""
        return State(params=dict(initial))

    def turns(self, round_idx: int, sites: Sequence[Participant]) -> list[list[Participant]]:
        """Who trains when: sites of one turn train side by side, and the next turn sees their aggregate."""
        return [list(sites)]

    def payload(self, state: State, site: Participant) -> Payload:
        """What this site receives: exactly the tensors it exchanges."""
        return Payload({name: state.params[name] for name in site.wire_shapes})

    def aggregate(self, state: State, updates: Mapping[str, Update]) -> State:
        """The state after a turn. Raises when it cannot do what its paper says; never falls back to another algorithm.

        Must not change ``state`` or ``updates``, and must not depend on the order of sites.
        """
        raise NotImplementedError

    def local_loss(self, loss: Tensor, step: LocalStep) -> Tensor:
        """The site's half: the loss to minimise, given nnU-Net's own."""
        return loss

    def local_extras(self, network: nn.Module) -> Params:
        """The site's half: named tensors to send beside the update, after training. The egress ledger has them too."""
        return {}
