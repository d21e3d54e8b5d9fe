"""Parameter scopes: which tensors are averaged by whom, and the names they travel under.

Every parameter of a site's network has one scope:

- ``shared``: one copy in the federation, averaged over all sites; travels under its own name. Where rules say so, one
  copy per shape, averaged over the sites that have that shape; then it travels as ``name@4x2x3x3x3``.
- ``group``: one copy per modality, and one per input channel ("slot") where the tensor has an input-channel axis;
  averaged over the sites of that modality that own that slot. Travels as ``name@modality`` or ``name@modality.slot``.
- ``personal``: one copy per site. Never leaves it.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

import torch
from torch import Tensor

from fedcmt.params import ParameterError, Params, check_shapes


class Scope(StrEnum):
    """Who averages a parameter."""

    SHARED = "shared"
    GROUP = "group"
    PERSONAL = "personal"


_LAST = "{last}"


@dataclass(frozen=True)
class ScopeRules:
    """Ordered rules from parameter names to scopes; the first pattern that matches the start of a name decides.

    Attributes:
      rules: Pairs of a regular expression (matched at the start of the name) and a scope. ``{last}`` in one stands for
        the highest number that a name of the network has in that place, e.g. the decoder's last stage.
      complete: Whether each rule must decide at least one parameter, so that rules for another network are noticed.
      by_shape: Whether shared tensors have one copy per shape.
    """

    rules: tuple[tuple[str, Scope], ...]
    complete: bool = False
    by_shape: bool = False

    @property
    def keep_everything(self) -> bool:
        """Whether every rule says personal, so that no tensor leaves a site."""
        return all(scope is Scope.PERSONAL for _, scope in self.rules)

    def scopes_of(self, names: Collection[str]) -> dict[str, Scope]:
        """The scope of every parameter of a network.

        Raises:
          ParameterError: If no rule matches a name, ``{last}`` stands for nothing, or a rule of ``complete`` rules
            decides no name.
        """
        numbered = replace(self, rules=tuple((_numbered(pattern, names), scope) for pattern, scope in self.rules))
        deciding = {name: numbered._rule_of(name) for name in names}
        idle = [rule[0] for rule in numbered.rules if rule not in deciding.values()]
        if self.complete and idle:
            raise ParameterError(
                f"scope rules {idle} match none of the network's {len(names)} parameters (or only such that an earlier "
                "rule has); they are for another network"
            )
        return {name: scope for name, (_, scope) in deciding.items()}

    def scope_of(self, name: str) -> Scope:
        """The scope of one parameter, by rules without ``{last}``.

        Raises:
          ParameterError: If no rule matches: a parameter without a scope is a mistake, not a personal one.
        """
        return self._rule_of(name)[1]

    def _rule_of(self, name: str) -> tuple[str, Scope]:
        for pattern, scope in self.rules:
            if _LAST in pattern:
                raise ParameterError(f"scope rule {pattern!r} needs the names of the whole network: use scopes_of")
            if re.match(pattern, name):
                return pattern, scope
        raise ParameterError(f"no scope rule matches parameter {name!r}; rules: {[p for p, _ in self.rules]}")


def _numbered(pattern: str, names: Collection[str]) -> str:
    """The pattern with the highest number instead of ``{last}``."""
    if _LAST not in pattern:
        return pattern
    numbered = re.compile(pattern.replace(_LAST, r"(?P<last>\d+)"))
    numbers = [int(found["last"]) for name in names if (found := numbered.match(name))]
    if not numbers:
        raise ParameterError(f"scope rule {pattern!r}: no parameter has a number there; it is for another network")
    return pattern.replace(_LAST, str(max(numbers)))


ALL_SHARED = ScopeRules((("", Scope.SHARED),))
"""FedAvg: the whole network is common."""

ALL_PERSONAL = ScopeRules((("", Scope.PERSONAL),))
"""Standalone: nothing leaves a site."""

ADAPTER = r"encoder\.(stem\.convs\.0|stages\.0\.0\.convs\.0)\."
"""First conv-norm-nonlinearity block of nnU-Net's networks: ResidualEncoderUNet's stem, PlainConvUNet's first block."""

ADAPTER_ENCODER_DECODER = ScopeRules(
    ((ADAPTER, Scope.GROUP), (r"encoder\.", Scope.SHARED), (r"(decoder|head)\.", Scope.PERSONAL))
)
"""FedCMT: modality adapters by group, the rest of the encoder shared, decoders personal."""

PERSONAL_ADAPTER = ScopeRules(
    ((ADAPTER, Scope.PERSONAL), (r"encoder\.", Scope.SHARED), (r"(decoder|head)\.", Scope.PERSONAL))
)
"""FedCMT without group adapters: every site keeps its own."""


def slot_name(channel: str) -> str:
    """The slot an nnU-Net channel name stands for: lower case without blanks, so that "T1 ce" and "T1CE" are one."""
    return re.sub(r"\s+", "", channel).lower()


def _by_shape(name: str, shape: Sequence[int]) -> str:
    return f"{name}@{'x'.join(map(str, shape))}"


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
        self.scopes = rules.scopes_of(shapes)
        self.personal = frozenset(n for n, s in self.scopes.items() if s is Scope.PERSONAL)
        self._shapes = {name: tuple(shape) for name, shape in shapes.items()}
        self._wires: dict[str, _Wire] = {}
        group = slot_name(modality)
        for name, scope in self.scopes.items():
            if scope is Scope.SHARED:
                self._wires[_by_shape(name, self._shapes[name]) if rules.by_shape else name] = _Wire(name)
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

    def channels_of(self, wire_names: Collection[str]) -> dict[str, list[int]]:
        """Parameter to the input channels among ``wire_names``, for parameters of which others are not."""
        channels: dict[str, list[int]] = {}
        whole = self.parameters_of(wire_names)
        for key, wire in self._wires.items():
            if key in wire_names and wire.channel is not None and wire.parameter not in whole:
                channels.setdefault(wire.parameter, []).append(wire.channel)
        return channels

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
