"""Parameter scopes: which tensors are averaged by whom, and the names they travel under.

Every parameter of a site's network has one scope:

- ``shared``: one copy in the federation, averaged over all sites; travels under its own name.
- ``group``: one copy per modality, and one per input channel ("slot") where the tensor has an input-channel axis;
  averaged over the sites of that modality that own that slot. Travels as ``name@modality`` or ``name@modality.slot``.
- ``personal``: one copy per site. Never leaves it.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

from fedcmt.params import ParameterError, Params, check_shapes


class Scope(StrEnum):
    """Who averages a parameter."""

    SHARED = "shared"
    GROUP = "group"
    PERSONAL = "personal"


@dataclass(frozen=True)
class ScopeRules:
    """Ordered rules from parameter names to scopes; the first pattern that matches the start of a name decides.

    Attributes:
      rules: Pairs of a regular expression (matched at the start of the name) and a scope.
    """

    rules: tuple[tuple[str, Scope], ...]

    def scope_of(self, name: str) -> Scope:
        """The scope of one parameter.

        Raises:
          ParameterError: If no rule matches: a parameter without a scope is a mistake, not a personal one.
        """
        for pattern, scope in self.rules:
            if re.match(pattern, name):
                return scope
        raise ParameterError(f"no scope rule matches parameter {name!r}; rules: {[p for p, _ in self.rules]}")


ALL_SHARED = ScopeRules((("", Scope.SHARED),))
"""FedAvg: the whole network is common."""

ALL_PERSONAL = ScopeRules((("", Scope.PERSONAL),))
"""Standalone: nothing leaves a site."""

ADAPTER = r"encoder\.(stem\.convs\.0|stages\.0\.0\.convs\.0)\."
"""First conv-norm-nonlinearity block of nnU-Net's networks: ResidualEncoderUNet's stem, PlainConvUNet's first block."""

ADAPTER_ENCODER_DECODER = ScopeRules(
    ((ADAPTER, Scope.GROUP), (r"encoder\.", Scope.SHARED), (r"decoder\.", Scope.PERSONAL))
)
"""FedCMT: modality adapters by group, the rest of the encoder shared, decoders personal."""

PERSONAL_ADAPTER = ScopeRules(((ADAPTER, Scope.PERSONAL), (r"encoder\.", Scope.SHARED), (r"decoder\.", Scope.PERSONAL)))
"""FedCMT without group adapters: every site keeps its own."""


def slot_name(channel: str) -> str:
    """The slot an nnU-Net channel name stands for: lower case without blanks, so that "T1 ce" and "T1CE" are one."""
    return re.sub(r"\s+", "", channel).lower()


@dataclass(frozen=True)
class _Wire:
    """One tensor on the wire: a whole parameter, or one input channel of it."""

    parameter: str
    channel: int | None = None


class Partition:
    """How one site's parameters map to the wire: what leaves under which name, and what never does.

    Args:
      rules: Scope of each parameter name.
      shapes: Name to shape of every parameter of the site's network.
      modality: The site's modality, e.g. ``"MR"``.
      channels: The site's channel names in nnU-Net's order.
      input_parameters: Names of the parameters whose axis 1 counts input channels (the first convolution's weight).

    Raises:
      ParameterError: If two channels are the same slot, or a group tensor's axis 1 does not count the channels.
    """

    def __init__(
        self,
        rules: ScopeRules,
        shapes: Mapping[str, tuple[int, ...]],
        *,
        modality: str,
        channels: Sequence[str],
        input_parameters: Collection[str],
    ) -> None:
        slots = [slot_name(c) for c in channels]
        if len(set(slots)) != len(slots):
            raise ParameterError(f"channels {list(channels)} name one slot twice; give each channel its own name")
        self.scopes = {name: rules.scope_of(name) for name in shapes}
        self.personal = frozenset(n for n, s in self.scopes.items() if s is Scope.PERSONAL)
        self._shapes = {name: tuple(shape) for name, shape in shapes.items()}
        self._wires: dict[str, _Wire] = {}
        group = slot_name(modality)
        for name, scope in self.scopes.items():
            if scope is Scope.SHARED:
                self._wires[name] = _Wire(name)
            elif scope is Scope.GROUP and name in input_parameters:
                if self._shapes[name][1] != len(slots):
                    raise ParameterError(
                        f"{name} has {self._shapes[name][1]} input channels, the site has {len(slots)}: {slots}"
                    )
                self._wires.update({f"{name}@{group}.{slot}": _Wire(name, c) for c, slot in enumerate(slots)})
            elif scope is Scope.GROUP:
                self._wires[f"{name}@{group}"] = _Wire(name)

    @property
    def wire_shapes(self) -> dict[str, tuple[int, ...]]:
        """Wire name to shape of everything this site exchanges."""
        return {key: self._wire_shape(wire) for key, wire in self._wires.items()}

    def parameters_of(self, wire_names: Collection[str]) -> frozenset[str]:
        """The parameters whose every wire tensor is among ``wire_names``."""
        others = {wire.parameter for key, wire in self._wires.items() if key not in wire_names}
        return frozenset(wire.parameter for wire in self._wires.values()) - others

    def outgoing(self, tensors: Mapping[str, Tensor]) -> Params:
        """Named parameters (personal ones are left out) to wire tensors; copies, so training does not change them."""
        return {
            key: (tensors[w.parameter] if w.channel is None else tensors[w.parameter][:, w.channel]).to(
                "cpu", copy=True
            )
            for key, w in self._wires.items()
        }

    def incoming(self, payload: Mapping[str, Tensor]) -> Params:
        """Wire tensors to named parameters, whole again.

        Raises:
          ParameterError: If a wire name is missing or unknown, or a shape differs.
        """
        check_shapes(payload, self.wire_shapes, where="payload")
        by_parameter: dict[str, list[Tensor]] = {}
        for key, wire in self._wires.items():
            by_parameter.setdefault(wire.parameter, []).append(payload[key])
        return {
            name: torch.stack(parts, dim=1) if parts[0].shape != self._shapes[name] else parts[0]
            for name, parts in by_parameter.items()
        }

    def _wire_shape(self, wire: _Wire) -> tuple[int, ...]:
        shape = self._shapes[wire.parameter]
        return shape if wire.channel is None else (shape[0], *shape[2:])
