"""FedMEPD: an encoder per sequence, a decoder that turns personal filter by filter, anchors from a site with all data.

Liu et al., Federated modality-specific encoders and partially personalized fusion decoder, Medical Image Analysis,
2025, https://arxiv.org/abs/2603.04887, with the constants of its released code. One site, the fusion site, holds every
sequence; it trains alone in round 0, to make anchors, and last in all rounds after that. The server's part of a round:

1. once the others have trained, E of each sequence moves by the plain mean over the sites that hold it, and filter j of
   the fusion decoder becomes

       λ S_j + (1 − λ) Σ_i H_ij W_ij / Σ_i H_ij        S: the decoder before the round

   over the sites that still share j, and stays S_j where there is none;
2. once the fusion site has trained from there, its network is the server's, and its anchors go out with the next round;
3. each site's change of a filter is set against the server's in this round. A site that has disagreed P rounds running
   keeps the filter for itself from then on; one of small changes beside the server's gains weight H.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from fedcmt.algorithms.base import Participant, Payload, State, Update
from fedcmt.algorithms.fedmepd_site import AnchorSite
from fedcmt.algorithms.filters import Filters, compare, convolutions, is_patience, mean_change
from fedcmt.models.scopes import Scope, ScopeRules
from fedcmt.params import ParameterError, Params, check_finite, check_shapes, shapes
from fedcmt.settings import is_int, is_number, require

FUSION = "fusion"
"""Role of the site that holds all sequences."""

ServerChange = Literal["total", "train_only"]

_ENCODERS, _DECODER, _ANCHORS = "encoders.", "decoder.", "anchors."
_CHANGE, _BEFORE = "change/", "before/"
"""What the state remembers from the sites' turn to the fusion site's."""


class FedMEPD(AnchorSite):
    """A site ends with its own network as trained last; the fusion site's is the server's.

    Beside the shared tensors, the state keeps anchors, under their names in a payload, and the `Filters` of every site
    but the fusion site, as ``patience/<site>/<convolution>`` and ``weight/<site>/<convolution>``.

    Args:
      patience: P, rounds in a row in which a site disagrees about a filter before it is personal. 0: the decoder is
        personal from the start; null: it stays shared for ever.
      pretrain_rounds: Rounds after the first in which patience and weights stay as they are.
      server_share: λ in [0, 1].
      smoothing: In [0, 1], how much of H stays each round; 1 is plain means over sites.
      largest_ratio: From 1 up: how often the server's change may be a site's where H follows the two. A site that
        changes next to nothing gains the most weight by it, and holds the others back.
      delta_server: What a site's change is set against: "total", how the decoder has moved since the sites received it
        (as released), or "train_only", what the fusion site has made of it.
      server_in_encoder_mean: Whether the server's own encoders count in the mean as one more site's.
      anchors: Whether the fusion site's anchors go to the others.
      anchors_per_class: K, as the network has them (``planning.network_options.anchors_per_class``).

    Raises:
      ValueError: If a setting is out of range.
    """

    product: ClassVar[Literal["received", "trained"]] = "trained"
    scopes = ScopeRules(
        (
            (r"encoders\.", Scope.SHARED),
            (r"decoder\.", Scope.SHARED),
            (r"(auxiliary|calibration|anchors)\.", Scope.PERSONAL),
        ),
        complete=True,
    )

    def __init__(
        self,
        patience: int | None = 10,
        pretrain_rounds: int = 30,
        server_share: float = 0.3,
        smoothing: float = 0.95,
        largest_ratio: float = 1000.0,
        delta_server: ServerChange = "total",
        server_in_encoder_mean: bool = False,
        anchors: bool = True,
        anchors_per_class: int = 4,
    ) -> None:
        patient = patience is None or (is_int(patience) and is_patience(patience))
        in_mean, per_class = server_in_encoder_mean, anchors_per_class
        for key, value, ok, expected in (
            ("patience", patience, patient, "null or a whole number from 0 to 32767"),
            ("pretrain_rounds", pretrain_rounds, is_int(pretrain_rounds) and pretrain_rounds >= 0, "a number from 0"),
            ("server_share", server_share, is_number(server_share) and 0 <= server_share <= 1, "in [0, 1]"),
            ("smoothing", smoothing, is_number(smoothing) and 0 <= smoothing <= 1, "in [0, 1]"),
            ("largest_ratio", largest_ratio, is_number(largest_ratio) and largest_ratio >= 1, "a number from 1"),
            ("delta_server", delta_server, delta_server in get_args(ServerChange), "total or train_only"),
            ("server_in_encoder_mean", in_mean, isinstance(in_mean, bool), "true or false"),
            ("anchors", anchors, isinstance(anchors, bool), "true or false"),
            ("anchors_per_class", per_class, is_int(per_class) and per_class >= 1, "a whole number from 1"),
        ):
            require(ok, "FedMEPD", key, value, expected)
        super().__init__(per_class, send_anchors=anchors)
        self.patience = patience
        self.pretrain_rounds = pretrain_rounds
        self.server_share = server_share
        self.smoothing = smoothing
        self.largest_ratio = largest_ratio
        self.delta_server: ServerChange = delta_server
        self.server_in_encoder_mean = server_in_encoder_mean
        self.anchors = anchors

    def init(self, initial: Params, sites: Sequence[Participant], num_rounds: int) -> State:
        """The state before round 0: every filter of every site is shared, with H = 1.

        The record counts rounds by the fusion site's turns, keeps each other site's training cases and sequences, and
        which sites have left.

        Raises:
          ParameterError: If there is not exactly one fusion site, or another site exchanges what that one does not.
        """
        fusion = _fusion_site(sites)
        held = {name: initial[name] for name in fusion.wire_shapes}
        state = State(held, record={"round": 0, "fusion": fusion.name, "sites": {}, "left": [], "curves": {}})
        for site in sites:
            state = self.register(state, site, initial)
        return state

    def register(self, state: State, site: Participant, initial: Params) -> State:
        """The state with a further site, all of whose filters are shared; one that comes back has kept its own.

        Raises:
          ParameterError: If it is a second fusion site, or exchanges what the fusion site does not.
        """
        _check_wire(site, state)
        if site.name == state.record["fusion"]:
            return state
        memory = state.memory
        if site.name not in (*state.record["sites"], *state.record["left"]):
            fresh = {c: Filters.fresh(count, self.patience) for c, count in _convolutions(state).items()}
            memory = {**memory, **_stored(site.name, fresh)}
        entry = {"cases": site.num_cases, "sequences": _sequences(site.wire_shapes)}
        left = [name for name in state.record["left"] if name != site.name]
        record = {**state.record, "sites": {**state.record["sites"], site.name: entry}, "left": left}
        return replace(state, memory=memory, record=record)

    def leave(self, state: State, site: str) -> State:
        """The state in which the site's cases count no more; its filters stay as they are until it comes back.

        Raises:
          ParameterError: If it is the fusion site, without which there are no rounds.
        """
        if site == state.record["fusion"]:
            raise ParameterError(f"FedMEPD: fusion site {site!r} cannot leave, its anchors are the other sites'")
        present = {name: entry for name, entry in state.record["sites"].items() if name != site}
        return replace(state, record={**state.record, "sites": present, "left": sorted([*state.record["left"], site])})

    def turns(self, round_idx: int, sites: Sequence[Participant]) -> list[list[Participant]]:
        """The fusion site alone in round 0; later all others, and then the fusion site.

        Raises:
          ParameterError: If there is not exactly one fusion site.
        """
        fusion = _fusion_site(sites)
        others = [site for site in sites if site is not fusion]
        return [others, [fusion]] if others and round_idx > 0 else [[fusion]]

    def payload(self, state: State, site: Participant) -> Payload:
        """The site's encoders, the filters it still shares, and the anchors once there are any; all to the fusion site.

        Raises:
          ParameterError: If the site has not been registered.
        """
        if site.name == state.record["fusion"]:
            return Payload(dict(state.params))
        rows = _rows(state, site.name)
        tensors: Params = {}
        for name in _names(state, site.name):
            if name not in rows:
                tensors[name] = state.params[name]
            elif rows[name]:
                tensors[name] = state.params[name][list(rows[name])]
        return Payload(tensors, _anchors(state.memory), rows=rows)

    def aggregate(self, state: State, updates: Mapping[str, Update]) -> State:
        """The state after a turn, the fusion site's or the others'.

        A site that does not answer counts nowhere, and keeps its patience and its weights. So do all where the fusion
        site does not answer: what they sent is forgotten when they train again.

        Raises:
          ParameterError: If there is no update, the fusion site's comes with others, or one is of an unknown site, of
            other tensors or rows than the site received, not finite, or without the anchors that are due.
        """
        fusion = state.record["fusion"]
        if not updates or (fusion in updates and len(updates) > 1):
            raise ParameterError(
                f"FedMEPD: updates of {sorted(updates)}, expected those of fusion site {fusion!r} alone, or of one or "
                "more others"
            )
        for site, update in sorted(updates.items()):
            _check_update(state, site, update)
        if fusion in updates:
            return self._after_fusion(state, updates[fusion])
        return self._after_sites(state, updates)

    def _after_sites(self, state: State, updates: Mapping[str, Update]) -> State:
        """Encoders and decoder combined; what each site changed is remembered for the fusion site's turn."""
        moves = {**self._encoder_moves(updates), **self._decoder_moves(state, updates)}
        memory = {**_lasting(state.memory), **self._remembered(state, updates)}
        entries = state.record["sites"]
        entries = {**entries, **{site: {**entries[site], "cases": u.num_cases} for site, u in updates.items()}}
        record = {**state.record, "sites": entries, "curves": _federated_shares(state)}
        return State(_moved(state.params, moves), memory, record)

    def _encoder_moves(self, updates: Mapping[str, Update]) -> Params:
        """Per encoder tensor, the plain mean over the sites that sent it."""
        moves: Params = {}
        for name in sorted({name for update in updates.values() for name in update.delta if _sequence(name)}):
            senders = [site for site in sorted(updates) if name in updates[site].delta]
            total = torch.zeros_like(updates[senders[0]].delta[name], dtype=torch.float64)
            for site in senders:
                total += updates[site].delta[name]
            # The server's own copy is where the change is measured from, so it only divides.
            moves[name] = total / (len(senders) + self.server_in_encoder_mean)
        return moves

    def _decoder_moves(self, state: State, updates: Mapping[str, Update]) -> Params:
        """Per decoder tensor, (1 − λ) times the weighted mean change of each filter.

        All sites have started from S, so λ S + (1 − λ) mean(W) is S + (1 − λ) mean(W − S), and where no site shares a
        filter there is no move.
        """
        moves: Params = {}
        for name in (name for name in state.params if name.startswith(_DECODER)):
            convolution = name.rpartition(".")[0]
            members = [
                (_filters(state, site, convolution), updates[site].delta[name])
                for site in sorted(updates)
                if name in updates[site].delta
            ]
            if members:
                moves[name] = (1 - self.server_share) * mean_change(members)
        return moves

    def _remembered(self, state: State, updates: Mapping[str, Update]) -> Params:
        """What each site has changed and, where it is set against the server's moves too, from where; no biases."""
        memory: Params = {}
        for convolution in _convolutions(state):
            weight = f"{convolution}.weight"
            changes = {site: update.delta[weight].float() for site, update in updates.items() if weight in update.delta}
            memory |= {f"{_CHANGE}{site}/{convolution}": change for site, change in changes.items()}
            if changes and self.delta_server == "total":
                memory[f"{_BEFORE}{convolution}"] = state.params[weight].float()
        return memory

    def _after_fusion(self, state: State, update: Update) -> State:
        """The fusion site's network and anchors; then patience and weights, if it is their time."""
        params = _moved(state.params, update.delta)
        memory = {**_lasting(state.memory), **self._new_anchors(state, update)}
        entries, round_idx = state.record["sites"], state.record["round"]
        cases = sum(entry["cases"] for entry in entries.values())
        curves: dict[str, float] = {}
        for site, entry in sorted(entries.items()):
            compared = dict(self._compared(state, params, update, site))
            if compared:
                curves[f"cosine/{site}"] = float(torch.cat([cosine for cosine, _ in compared.values()]).mean())
            if round_idx <= self.pretrain_rounds:
                continue
            share = entry["cases"] / cases
            judged = {
                convolution: _filters(state, site, convolution).judged(
                    cosine, ratio, patience=self.patience, share=share, smoothing=self.smoothing
                )
                for convolution, (cosine, ratio) in compared.items()
            }
            memory |= _stored(site, judged)
        state = State(params, memory, {**state.record, "round": round_idx + 1})
        return replace(state, record={**state.record, "curves": {**curves, **_federated_shares(state)}})

    def _compared(
        self, state: State, params: Params, update: Update, site: str
    ) -> Iterator[tuple[str, tuple[Tensor, Tensor]]]:
        """Convolution to the cosines and ratios of the filters that the site trained and shares, without biases."""
        for convolution in _convolutions(state):
            change = state.memory.get(f"{_CHANGE}{site}/{convolution}")
            if change is None:
                continue
            weight = f"{convolution}.weight"
            if self.delta_server == "total":
                server = params[weight].double() - state.memory[f"{_BEFORE}{convolution}"].double()
            else:
                server = update.delta[weight]
            shared = _filters(state, site, convolution).federated
            yield convolution, compare(server[shared], change, self.largest_ratio)

    def _new_anchors(self, state: State, update: Update) -> Params:
        """The anchors of the fusion site's update, which replace the former ones.

        Raises:
          ParameterError: If there are none although anchors are on, or other extras.
        """
        where = f"FedMEPD: extras of fusion site {state.record['fusion']!r}"
        foreign = sorted(name for name in update.extras if not (self.anchors and name.startswith(_ANCHORS)))
        if foreign or bool(update.extras) != self.anchors:
            raise ParameterError(
                f"{where}: {foreign or 'none'}, expected {'anchors.<level> only' if self.anchors else 'none'}; anchors "
                f"is {self.anchors} at the server and must be so at every site"
            )
        check_finite(update.extras, where=where)
        if former := _anchors(state.memory):
            check_shapes(update.extras, shapes(former), where=where)
        return dict(update.extras)


def _fusion_site(sites: Sequence[Participant]) -> Participant:
    found = [site for site in sites if site.role == FUSION]
    if len(found) != 1:
        raise ParameterError(
            f"FedMEPD: sites {sorted(site.name for site in found)} of {sorted(site.name for site in sites)} have the "
            f"role {FUSION!r}, expected exactly one: a site that holds all sequences"
        )
    return found[0]


def _sequence(name: str) -> str | None:
    """The sequence that an encoder's tensor is for; None of other tensors."""
    return name.removeprefix(_ENCODERS).partition(".")[0] if name.startswith(_ENCODERS) else None


def _sequences(names: Collection[str]) -> list[str]:
    return sorted({sequence for name in names if (sequence := _sequence(name))})


def _convolutions(state: State) -> dict[str, int]:
    """The decoder's convolutions by name, and their numbers of filters."""
    return convolutions({n: tuple(t.shape) for n, t in state.params.items() if n.startswith(_DECODER)})


def _names(state: State, site: str) -> list[str]:
    """Wire names of a site, whether anything travels under them or not."""
    if site not in state.record["sites"]:
        raise ParameterError(f"FedMEPD: {site!r} is not known, expected one of {sorted(state.record['sites'])}")
    return _of_sequences(state, state.record["sites"][site]["sequences"])


def _of_sequences(state: State, sequences: Collection[str]) -> list[str]:
    """Wire names of a site that holds these sequences: their encoders and the decoder."""
    return [name for name in state.params if name.startswith(_DECODER) or _sequence(name) in sequences]


def _rows(state: State, site: str) -> dict[str, tuple[int, ...]]:
    """Decoder tensors that do not travel whole to and from a site, and the rows that do."""
    rows: dict[str, tuple[int, ...]] = {}
    for name in (name for name in state.params if name.startswith(_DECODER)):
        filters = _filters(state, site, name.rpartition(".")[0])
        if not bool(filters.federated.all()):
            rows[name] = filters.rows
    return rows


def _filters(state: State, site: str, convolution: str) -> Filters:
    return Filters(*(state.memory[f"{kind}/{site}/{convolution}"] for kind in ("patience", "weight")))


def _stored(site: str, filters: Mapping[str, Filters]) -> Params:
    """A site's filters by convolution, under the names that the state's memory has them."""
    patience = {f"patience/{site}/{convolution}": own.patience for convolution, own in filters.items()}
    return patience | {f"weight/{site}/{convolution}": own.weight for convolution, own in filters.items()}


def _anchors(memory: Params) -> Params:
    return {name: tensor for name, tensor in memory.items() if name.startswith(_ANCHORS)}


def _lasting(memory: Params) -> Params:
    """What the state remembers beyond the round."""
    return {name: tensor for name, tensor in memory.items() if not name.startswith((_CHANGE, _BEFORE))}


def _moved(params: Params, moves: Mapping[str, Tensor]) -> Params:
    return {n: (t.double() + moves[n].double()).to(t.dtype) if n in moves else t for n, t in params.items()}


def _federated_shares(state: State) -> dict[str, float]:
    """Of each site, the share of the decoder's filters that are not personal yet."""
    shares: dict[str, float] = {}
    for site in sorted(state.record["sites"]):
        federated = torch.cat([_filters(state, site, convolution).federated for convolution in _convolutions(state)])
        shares[f"federated_share/{site}"] = float(federated.double().mean())
    return shares


def _check_wire(site: Participant, state: State) -> None:
    """Raise `ParameterError` unless the site's role, encoders and decoder fit those that the fusion site brought."""
    fusion = state.record["fusion"]
    if (site.role == FUSION) != (site.name == fusion):
        raise ParameterError(f"FedMEPD: site {site.name!r} has the role {site.role!r}, the fusion site is {fusion!r}")
    own = _sequences(site.wire_shapes)
    if lacking := sorted(set(own) - set(_sequences(state.params))):
        raise ParameterError(
            f"FedMEPD: site {site.name!r} has the sequences {lacking}, which fusion site {fusion!r} lacks; it must "
            "hold every sequence that another site has"
        )
    names = list(state.params) if site.name == fusion else _of_sequences(state, own)
    expected = {name: state.params[name] for name in names}
    where = f"FedMEPD: the server's network against that of site {site.name!r}"
    check_shapes(expected, dict(site.wire_shapes), where=where)


def _check_update(state: State, site: str, update: Update) -> None:
    """Raise `ParameterError` unless the update is of what its site received, finite, and of at least one case."""
    where = f"FedMEPD: update of {site!r}"
    expected: dict[str, Any] = shapes(state.params)
    if site != state.record["fusion"]:
        names, rows = _names(state, site), _rows(state, site)
        expected = {
            name: (len(rows[name]), *expected[name][1:]) if name in rows else expected[name]
            for name in names
            if rows.get(name) != ()
        }
    check_shapes(update.delta, expected, where=where)
    check_finite(update.delta, where=where)
    if update.num_cases < 1:
        raise ParameterError(f"{where}: num_cases is {update.num_cases}, expected a whole number from 1")
