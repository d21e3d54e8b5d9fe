"""FedHCA²: every site keeps an encoder and a decoder of its own, and adds to each what helps it of the others' updates.

Lu et al., FedHCA²: Towards Hetero-Client Federated Multi-Task Learning, CVPR 2024, https://arxiv.org/abs/2311.13250.
With Δ_i what site i changed in a round, per site i and decoder layer ℓ:

    encoder   new_i  = last_i  + Δ_i  + clamp(α_i, 0, 1) U        U: conflict-averse direction of all encoders
    decoder   new_iℓ = last_iℓ + Δ_iℓ + clamp(β_iℓ, 0, 1) X_iℓ    X: attention of Δ_iℓ over all decoders' Δ_jℓ

Heads stay with their sites. The server learns the hyperweights α and β: it takes the site's next change as minus the
gradient with respect to new_i, so that a hyperweight rises if the site went on along what it had been given.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from scipy.special import softmax
from torch import Tensor

from fedcmt.algorithms.base import Algorithm, Participant, Payload, State, Update
from fedcmt.algorithms.conflict_averse import GramMatrix, combine, rescale, solve
from fedcmt.algorithms.fedper import HEAD
from fedcmt.models.scopes import Scope, ScopeRules
from fedcmt.params import ParameterError, Params, Selection, Tensors, check_shapes, norm, shapes
from fedcmt.settings import is_number, require

_ENCODER = "encoder"
"""Name of α among a site's hyperweights; those of β are the decoder's layers."""


class FedHCA2(Algorithm):
    """A site ends with its own encoder and decoder as the server has last stepped them, under its own heads.

    The state's parameters are the means over sites, from which a site that joins later starts; each site's own are in
    its memory as ``site/<site>/<wire name>``.

    Args:
      radius: c in [0, 1) of the conflict-averse direction.
      start: First value of every hyperweight, in [0, 1].
      lr: Learning rate of the hyperweights' SGD, ≥ 0.
      momentum: Its momentum, in [0, 1).
      weight_decay: Its weight decay, ≥ 0.
      homogeneous: Groups of sites of one task on one kind of data, which share the mean of their encoders' changes.
      cosine: Whether inner products, in gradients and attention, are of unit vectors. Raw ones (the paper's) depend on
        the length of updates: large ones drive a hyperweight to 0 or 1 at once and make attention pick one site, small
        ones leave it all but uniform.

    Raises:
      ValueError: If a setting is out of range.
    """

    scopes = ScopeRules(((HEAD, Scope.PERSONAL), (r"(encoder|decoder)\.", Scope.SHARED)), complete=True)

    def __init__(
        self,
        radius: float = 0.4,
        start: float = 0.1,
        lr: float = 0.01,
        momentum: float = 0.9,
        weight_decay: float = 1e-4,
        homogeneous: Sequence[Sequence[str]] = (),
        cosine: bool = False,
    ) -> None:
        for key, value, ok, expected in (
            ("radius", radius, is_number(radius) and 0 <= radius < 1, "in [0, 1)"),
            ("start", start, is_number(start) and 0 <= start <= 1, "in [0, 1]"),
            ("lr", lr, is_number(lr) and lr >= 0, "a number from 0"),
            ("momentum", momentum, is_number(momentum) and 0 <= momentum < 1, "in [0, 1)"),
            ("weight_decay", weight_decay, is_number(weight_decay) and weight_decay >= 0, "a number from 0"),
            ("homogeneous", homogeneous, _are_groups(homogeneous), "lists of site names, each site in at most one"),
            ("cosine", cosine, isinstance(cosine, bool), "true or false"),
        ):
            require(ok, "FedHCA2", key, value, expected)
        self.radius = radius
        self.start = start
        self.lr = lr
        self.momentum = momentum
        self.weight_decay = weight_decay
        self.homogeneous = [list(group) for group in homogeneous]
        self.cosine = cosine

    def init(self, initial: Params, sites: Sequence[Participant], num_rounds: int) -> State:
        """The state before round 0: every site has the same initial tensors.

        Raises:
          ParameterError: If ``homogeneous`` names a site that does not take part.
        """
        unknown = {name for group in self.homogeneous for name in group} - {site.name for site in sites}
        if unknown:
            raise ParameterError(f"FedHCA2: homogeneous names {sorted(unknown)}, which are no sites of this job")
        state = State(dict(initial), record={"round": 0, "sites": {}})
        for site in sorted(sites, key=lambda site: site.name):
            state = self.register(state, site, initial)
        return state

    def register(self, state: State, site: Participant, initial: Params) -> State:
        """The state with a further site, which starts from the others' mean; one that comes back has kept its own."""
        if site.name in state.record["sites"]:
            return state
        params = {**state.params, **{n: t for n, t in initial.items() if n not in state.params}}
        own = {_key(site.name, name): params[name] for name in site.wire_shapes}
        weights = dict.fromkeys(sorted({_layer(name) for name in site.wire_shapes}), self.start)
        entry = {"stepped_in": None, "weights": weights, "momentum": {}}
        sites = {**state.record["sites"], site.name: entry}
        return State(params, {**state.memory, **own}, {**state.record, "sites": sites})

    def payload(self, state: State, site: Participant) -> Payload:
        """The site's own encoder and decoder."""
        return Payload({name: state.memory[_key(site.name, name)] for name in site.wire_shapes})

    def aggregate(self, state: State, updates: Mapping[str, Update]) -> State:
        """Hyperweights learn from these updates and what the sites had been given; then all sites are stepped anew.

        A site without an update keeps its tensors, its hyperweights and what they learn from.

        Raises:
          ParameterError: If there is no update, or one is of an unknown site, of other tensors or not finite.
        """
        deltas = {site: update.delta for site, update in sorted(updates.items())}
        _check_known(deltas, state)
        entries = {site: self._learn(state, site, delta) for site, delta in deltas.items()}
        direction, attended = self._direction(deltas), self._attended(deltas)
        round_idx, memory = state.record["round"], dict(state.memory)
        memory |= {f"direction/{round_idx}/{name}": tensor for name, tensor in direction.items()}
        for site, delta in self._shared_among_homogeneous(deltas).items():
            memory |= {f"attended/{site}/{name}": tensor for name, tensor in attended[site].items()}
            for name, change in delta.items():
                common = direction[name] if _is_encoder(name) else attended[site][name]
                weight = entries[site]["weights"][_layer(name)]
                memory[_key(site, name)] = personalised(memory[_key(site, name)], change, common, weight)
            entries[site] = {**entries[site], "stepped_in": round_idx}
        record = {"round": round_idx + 1, "sites": {**state.record["sites"], **entries}, "curves": _curves(entries)}
        memory = _without_old_directions(memory, record)
        return State(_means(state.params, memory, record["sites"]), memory, record)

    def _learn(self, state: State, site: str, delta: Mapping[str, Tensor]) -> dict[str, Any]:
        """The site's entry after a step of SGD on its hyperweights; as it is if it has not been given anything yet."""
        entry = state.record["sites"][site]
        if entry["stepped_in"] is None:
            return entry
        given = _given(state, site, delta)
        weights, buffers = {}, {}
        for layer, weight in entry["weights"].items():
            names = [name for name in delta if _layer(name) == layer]
            gradient = hyperweight_gradient(
                weight, {n: delta[n] for n in names}, {n: given[n] for n in names}, cosine=self.cosine
            )
            decayed = gradient + self.weight_decay * weight
            before = entry["momentum"].get(layer)
            buffers[layer] = decayed if before is None else self.momentum * before + decayed  # torch.optim.SGD
            weights[layer] = weight - self.lr * buffers[layer]
        return {**entry, "weights": weights, "momentum": buffers}

    def _direction(self, deltas: Mapping[str, Tensors]) -> Params:
        """U: the conflict-averse direction of the encoders over 1 + c², as in the paper's code; sites count alike."""
        encoders = {site: Selection(delta, [n for n in delta if _is_encoder(n)]) for site, delta in deltas.items()}
        gram = GramMatrix()
        for site, encoder in encoders.items():
            gram.add(site, encoder)
        solution = solve(gram.matrix(), np.ones(len(encoders)), self.radius)
        return combine(encoders, rescale(solution.coefficients, self.radius, 1))

    def _attended(self, deltas: Mapping[str, Tensors]) -> dict[str, Params]:
        """X by site: per decoder tensor, the attention over the sites that exchange it."""
        result: dict[str, Params] = {site: {} for site in deltas}
        for name in sorted({name for delta in deltas.values() for name in delta if not _is_encoder(name)}):
            members = {site: delta[name] for site, delta in deltas.items() if name in delta}
            for site, tensor in attention(members, cosine=self.cosine).items():
                result[site][name] = tensor
        return result

    def _shared_among_homogeneous(self, deltas: Mapping[str, Tensors]) -> dict[str, Tensors]:
        """The changes, with those of the encoders replaced by the mean of the sites of a homogeneous group."""
        result = dict(deltas)
        for group in self.homogeneous:
            present = {site: deltas[site] for site in sorted(group) if site in deltas}
            if len(present) < 2:
                continue
            encoders = {site: {n: t for n, t in delta.items() if _is_encoder(n)} for site, delta in present.items()}
            mean = combine(encoders, np.full(len(present), 1 / len(present)))
            result |= {site: {**delta, **mean} for site, delta in present.items()}
        return result


def personalised(last: Tensor, change: Tensor, common: Tensor, weight: float | Tensor) -> Tensor:
    """last + Δ + clamp(weight, 0, 1) · common, all of one shape."""
    return last + change + torch.as_tensor(weight, dtype=last.dtype).clamp(0, 1) * common


def hyperweight_gradient(
    weight: float, change: Mapping[str, Tensor], common: Mapping[str, Tensor], *, cosine: bool = False
) -> float:
    """∂L/∂weight through `personalised`, with ∂L/∂new taken as −(the site's next change).

    Args:
      weight: The raw hyperweight; outside [0, 1], where it is clamped, the gradient is 0.
      change: Δ of the round after, by name: all tensors that share the hyperweight.
      common: U or X of the round before, of the same names and shapes.
      cosine: Take the inner product of unit vectors, 0 for a zero vector.

    Returns:
      −Σ <Δ', common> in float64.
    """
    check_shapes(change, shapes(common), where="hyperweight_gradient")
    if not 0 <= weight <= 1:
        return 0.0
    inner = sum(float(torch.dot(t.flatten().double(), common[n].flatten().double())) for n, t in change.items())
    if cosine:
        length = norm(change) * norm(common)
        inner = inner / length if length > 0 else 0.0
    return -inner


def attention(changes: Mapping[str, Tensor], *, cosine: bool = False) -> dict[str, Tensor]:
    """X_i = Σ_j a_ij Δ_j, a_i = softmax_j(<Δ_i, Δ_j> / √n): what each site takes from all, itself included.

    Args:
      changes: Site to its change of one tensor of n elements, all of one shape.
      cosine: Take the cosine of Δ_i and Δ_j, 0 for a zero vector, instead of <Δ_i, Δ_j> / √n.

    Returns:
      Site to a float32 tensor of that shape.
    """
    members = {site: {"": tensor} for site, tensor in sorted(changes.items())}
    gram = GramMatrix()
    for site, tensors in members.items():
        gram.add(site, tensors)
    inner = gram.matrix()
    if cosine:
        lengths = np.sqrt(np.diagonal(inner))
        logits = np.divide(inner, np.outer(lengths, lengths), out=np.zeros_like(inner), where=inner != 0)
    else:
        logits = inner / np.sqrt(next(iter(changes.values())).numel())
    rows = softmax(logits, axis=1)
    return {site: combine(members, row)[""] for site, row in zip(gram.sites, rows, strict=True)}


def _is_encoder(name: str) -> bool:
    return name.startswith("encoder.")


def _layer(name: str) -> str:
    """Which hyperweight a tensor has: one for the encoder, one per module of the decoder (its weight and its bias)."""
    return _ENCODER if _is_encoder(name) else name.rpartition(".")[0]


def _key(site: str, name: str) -> str:
    return f"site/{site}/{name}"


def _given(state: State, site: str, names: Collection[str]) -> Params:
    """U and X that made the model which this site received."""
    stepped_in = state.record["sites"][site]["stepped_in"]
    return {
        name: state.memory[f"direction/{stepped_in}/{name}" if _is_encoder(name) else f"attended/{site}/{name}"]
        for name in names
    }


def _without_old_directions(memory: Params, record: Mapping[str, Any]) -> Params:
    """Drop each round's U from which no site will learn any more."""
    needed = {str(entry["stepped_in"]) for entry in record["sites"].values()}
    return {n: t for n, t in memory.items() if not n.startswith("direction/") or n.split("/")[1] in needed}


def _means(params: Params, memory: Mapping[str, Tensor], sites: Collection[str]) -> Params:
    """Per tensor, the mean over the sites that have one of this name."""
    means: Params = {}
    for name, tensor in params.items():
        own = [memory[_key(site, name)] for site in sorted(sites) if _key(site, name) in memory]
        means[name] = torch.stack(own).double().mean(0).to(tensor.dtype) if own else tensor
    return means


def _curves(entries: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """α of each site, and the mean of its β."""
    curves: dict[str, float] = {}
    for site, entry in entries.items():
        beta = [weight for layer, weight in entry["weights"].items() if layer != _ENCODER]
        curves |= {f"alpha/{site}": entry["weights"][_ENCODER], f"beta/{site}": float(np.mean(beta))}
    return curves


def _check_known(deltas: Mapping[str, Tensors], state: State) -> None:
    if not deltas:
        raise ParameterError("FedHCA2: no update to aggregate")
    for site, delta in deltas.items():
        if site not in state.record["sites"]:
            raise ParameterError(f"FedHCA2: update of {site!r}, known sites are {sorted(state.record['sites'])}")
        prefix = _key(site, "")
        own = {n.removeprefix(prefix): t for n, t in state.memory.items() if n.startswith(prefix)}
        check_shapes(delta, shapes(own), where=f"FedHCA2: update of {site!r}")


def _are_groups(groups: object) -> bool:
    if not isinstance(groups, list | tuple) or not all(isinstance(group, list | tuple) for group in groups):
        return False
    names = [name for group in groups for name in group]
    return all(isinstance(name, str) for name in names) and len(set(names)) == len(names)
