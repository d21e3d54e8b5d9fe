"""The contract of a federated algorithm, on one screen: both halves of it, the server's and the site's.

An algorithm is a rule from parameter names to scopes, how the server combines updates, and at most one extra term in
the local loss. It is pure: it knows tensors by their wire names (see `fedcmt.models.scopes`), not FLARE and not
nnU-Net.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from fedcmt.models.scopes import ScopeRules
from fedcmt.params import Params, Tensors


@dataclass(frozen=True)
class Participant:
    """What the server knows of a site.

    Attributes:
      name: The site's name in the federation.
      modality: E.g. "MR"; sites of one modality share group tensors.
      channels: nnU-Net channel names in the site's order.
      num_cases: Training cases, after the site's own validation cases are set aside.
      wire_shapes: Wire name to shape of every tensor the site exchanges.
      role: "site", or "fusion" for the one that holds all sequences and trains after the others, where an algorithm has
        such a site.
    """

    name: str
    modality: str
    channels: tuple[str, ...]
    num_cases: int
    wire_shapes: Mapping[str, tuple[int, ...]]
    role: str = "site"


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
    """What one site receives in a round.

    Attributes:
      tensors: Wire name to tensor.
      extras: Named extras such as anchors.
      frozen: Wire names that stay as received while the site trains, and that its update leaves out.
      rows: Wire name to the rows (on axis 0) that travel, both ways; the site keeps its own values of the others. The
        tensor has these rows only, and is left out where there are none. A name that is not here travels whole.
    """

    tensors: Params
    extras: Params = field(default_factory=dict)
    frozen: frozenset[str] = frozenset()
    rows: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Update:
    """What one site returns.

    Attributes:
      delta: trained - received; the payload's wire names and rows without the frozen ones.
      num_cases: Training cases of the site.
      num_steps: Optimiser steps taken.
      metrics: Plain numbers, e.g. ``val_dice_received`` in [0, 1].
      extras: Named tensors the algorithm asked for.
    """

    delta: Tensors
    num_cases: int
    num_steps: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    extras: Params = field(default_factory=dict)


@dataclass(frozen=True)
class LocalStep:
    """One training step as the local loss sees it.

    Attributes:
      network: The site's network in training mode.
      data: Input patches [B, C, *spatial].
      logits: Of the network: [B, K, *spatial] for segmentation, pooled [B, K] for classification.
      target: Labels [B, 1, *spatial], regions [B, K, *spatial] in {0, 1}, or classes [B], -1 where unknown.
      valid: True where the target counts, in the shape of the logits without axis 1; None where all of it does.
      regions: Whether the K outputs are independent (sigmoid) and not one choice (softmax).
      teacher: Logits for ``data`` of the network as it was when the round began, without gradient; one forward pass
        per call. Only in rounds for which `Algorithm.needs_teacher` says so.
      received: The round's received tensors by *parameter* name, on the network's device.
      extras: The round's extras as the payload had them.
      round_idx: 0-based round; 0 in the first round of a site that joined later.
      num_rounds: Rounds that schedules are made for; a job that is resumed may go on beyond them.
      output: All that the network returned; the logits are of it.
      cases: Ids of the batch's cases, which stay at the site.
    """

    network: nn.Module
    data: Tensor
    logits: Tensor
    target: Tensor
    valid: Tensor | None
    regions: bool
    teacher: Callable[[], Tensor]
    received: Mapping[str, Tensor]
    extras: Mapping[str, Tensor]
    round_idx: int
    num_rounds: int
    output: Any = None
    cases: Sequence[str] = ()


class Algorithm:
    """Base of all algorithms; a subclass states `scopes` and overrides what its paper changes.

    Attributes:
      scopes: Parameter name to shared, group or personal.
      product: The model a site ends with: ``"received"`` (the aggregate with the site's personal part) or ``"trained"``
        (the site's own model after its last local training).
      mean_only: Whether `aggregate` looks at nothing but the mean of each tensor's updates, weighted by ``num_cases``.
    """

    scopes: ScopeRules
    product: ClassVar[Literal["received", "trained"]] = "received"
    mean_only: ClassVar[bool] = False

    @property
    def sends_extras(self) -> bool:
        """Whether sites send tensors beside their updates: whether `local_extras` is the algorithm's own."""
        return type(self).local_extras is not Algorithm.local_extras

    def init(self, initial: Params, sites: Sequence[Participant], num_rounds: int) -> State:
        """The state before round 0, given initial values of every wire tensor and the length of the job."""
        return State(params=dict(initial))

    def register(self, state: State, site: Participant, initial: Params) -> State:
        """The state once a site has joined a running federation, or come back to it; nothing of the others changes.

        Args:
          state: The state after the last round.
          site: Who joins.
          initial: Initial values of every wire tensor of this site.
        """
        new = {name: tensor for name, tensor in initial.items() if name not in state.params}
        return replace(state, params={**state.params, **new})

    def leave(self, state: State, site: str) -> State:
        """The state without a site that has left; what that one finds again if it comes back stays."""
        return state

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

    def local_start(self, network: nn.Module, extras: Mapping[str, Tensor]) -> None:
        """The site's half: called once a round's payload is in the network, before its first step."""

    def local_state(self) -> tuple[Params, dict[str, Any]]:
        """The site's half: what it must remember from round to round, as tensors and plain values."""
        return {}, {}

    def restore_local(self, tensors: Params, plain: Mapping[str, Any]) -> None:
        """The site's half: go back to what `local_state` gave; both are empty before the first round."""

    def needs_teacher(self, round_idx: int, num_rounds: int) -> bool:
        """The site's half: whether `local_loss` calls ``step.teacher`` in this round."""
        return False

    def local_loss(self, loss: Tensor, step: LocalStep) -> Tensor:
        """The site's half: the loss to minimise, given nnU-Net's own."""
        return loss

    def local_extras(self, network: nn.Module) -> Params:
        """The site's half: named tensors to send beside the update, after training. The egress ledger has them too."""
        return {}
