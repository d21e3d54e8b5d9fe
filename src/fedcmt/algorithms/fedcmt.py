"""FedCMT: one federation over modalities and tasks, by scopes and a conflict-averse, adaptive server.

Zhang et al., FedCMT, IEEE Transactions on Medical Imaging, 2026. The first convolution block adapts each modality,
input channel by input channel (group scope); the rest of the encoder is common (shared); decoders belong to their sites
(personal). The server

1. weights sites by their cases and by how far they agree with the others (adaptive weights),
2. combines the encoder's updates so that the site that gains least gains most (conflict-averse), adapters as plain
   means over the sites that own them,
3. and hands the direction to an optimiser of its own (FedOpt).

A site distils from the model it received (global to local). One that joins later first trains alone behind a frozen
encoder, then counts more and more. docs/fedcmt.md leads from the paper's figure to these lines.
"""

import logging
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from fedcmt.algorithms.base import Algorithm, LocalStep, Participant, Payload, State, Update
from fedcmt.algorithms.conflict_averse import (
    GramMatrix,
    Normalisation,
    combine,
    leave_one_out_agreement,
    negligible,
    rescale,
    solve,
)
from fedcmt.algorithms.distillation import Distillation, read_distillation
from fedcmt.algorithms.fedavg import weighted_mean
from fedcmt.algorithms.fedopt import FEDCMT_SERVER, read_optimizer
from fedcmt.models.scopes import ADAPTER_ENCODER_DECODER, PERSONAL_ADAPTER
from fedcmt.params import ParameterError, Params, Selection, Tensors, norm
from fedcmt.settings import is_int, is_number, require

logger = logging.getLogger(__name__)

Granularity = Literal["whole", "stage", "tensor"]

_STAGE = re.compile(r"encoder\.(?:stem|stages\.\d+)")
_EMA = 0.9
_FIRST_AGREEMENT = 0.5
_WARM_START = 2
"""Rounds in which a site that joined trains its own part behind the frozen encoder."""
_LARGEST_GAP = 1e-6
"""Of the solver, above which the log says so; it closes to 1e-13 unless sites outnumber a block's elements."""
_LARGE_NORM_RATIO = 10
"""Longest over shortest update, above which the log says so."""
_RAMP = 5
"""Rounds over which its encoder update comes to count in full."""


class FedCMT(Algorithm):
    """A site ends with its own personalised model: adapter, encoder and decoder after its last local training.

    Args:
      radius: c in [0, 1): how far the direction may leave the mean, as a fraction of its length. 0 is no conflict
        handling.
      adaptive_radius: c_max in [0, 1); when given, c = c_max (1 - mean agreement) each round instead of ``radius``.
      rescale: 2 divides the direction by 1 + c (identical updates pass unchanged), 1 by 1 + c² (FedHCA2's code), 0 not.
      granularity: Where conflicts are weighed: over the whole encoder, per stage, or per tensor.
      normalisation: ``none``, ``unit`` or ``equalise``; see `solve`.
      case_exponent: q ≥ 0 in p_i ∝ |D_i|^q s_i^β; 0 gives sites equal weight.
      agreement_exponent: β ≥ 0; 0 switches the adaptive weights off.
      largest_share: Most of the weight that one of three or more sites may have; 1 is no cap.
      smallest_share: Least weight of a site, as a fraction of an equal share, in [0, 1], before all weights are scaled
        to sum to 1 again; 0 is no floor.
      adapters: ``group`` shares them within a modality, ``personal`` leaves them at their sites (ablation).
      optimizer: Fields of `fedcmt.algorithms.fedopt.ServerOptimizer`; the published SGD 1.0, momentum 0.6, cosine to
        0.9 if not given.
      distillation: Fields of `fedcmt.algorithms.distillation.Distillation`; ``{"maximum": 0}`` switches it off.

    Raises:
      ValueError: If a setting is out of range.
      TypeError: If a field of the optimiser or of the distillation is unknown.
    """

    product: ClassVar[Literal["received", "trained"]] = "trained"

    def __init__(
        self,
        radius: float = 0.4,
        adaptive_radius: float | None = None,
        rescale: Literal[0, 1, 2] = 2,
        granularity: Granularity = "whole",
        normalisation: Normalisation = "none",
        case_exponent: float = 1.0,
        agreement_exponent: float = 1.0,
        largest_share: float = 0.5,
        smallest_share: float = 0.2,
        adapters: Literal["group", "personal"] = "group",
        optimizer: Mapping[str, Any] | None = None,
        distillation: Mapping[str, Any] | None = None,
    ) -> None:
        for key, value, ok, expected in (
            ("radius", radius, is_number(radius) and 0 <= radius < 1, "in [0, 1)"),
            ("adaptive_radius", adaptive_radius, _is_radius_or_none(adaptive_radius), "null or in [0, 1)"),
            ("rescale", rescale, is_int(rescale) and rescale in (0, 1, 2), "0, 1 or 2"),
            ("granularity", granularity, granularity in get_args(Granularity), "whole, stage or tensor"),
            ("normalisation", normalisation, normalisation in get_args(Normalisation), "none, unit or equalise"),
            ("case_exponent", case_exponent, is_number(case_exponent) and 0 <= case_exponent <= 10, "in [0, 10]"),
            (
                "agreement_exponent",
                agreement_exponent,
                is_number(agreement_exponent) and 0 <= agreement_exponent <= 10,
                "in [0, 10]",
            ),
            ("largest_share", largest_share, is_number(largest_share) and 0.5 <= largest_share <= 1, "in [0.5, 1]"),
            ("smallest_share", smallest_share, is_number(smallest_share) and 0 <= smallest_share <= 1, "in [0, 1]"),
            ("adapters", adapters, adapters in ("group", "personal"), "group or personal"),
        ):
            require(ok, "FedCMT", key, value, expected)
        self.radius = radius
        self.adaptive_radius = adaptive_radius
        self.rescale: Literal[0, 1, 2] = rescale
        self.granularity = granularity
        self.normalisation = normalisation
        self.case_exponent = case_exponent
        self.agreement_exponent = agreement_exponent
        self.largest_share = largest_share
        self.smallest_share = smallest_share
        self.scopes = ADAPTER_ENCODER_DECODER if adapters == "group" else PERSONAL_ADAPTER
        self.optimizer = FEDCMT_SERVER if optimizer is None else read_optimizer(optimizer)
        self.distillation = Distillation() if distillation is None else read_distillation(distillation)

    def init(self, initial: Params, sites: Sequence[Participant], num_rounds: int) -> State:
        """The state before round 0.

        The record keeps the optimiser's clock, each site's running agreement, and of sites that join later (``joined``)
        how many rounds of their warm start are left (``warm``), how many of their encoder updates have counted
        (``counted``) and the adapters that were new with them (``own``).
        """
        record = {"round": 0, "num_rounds": num_rounds, "agreement": {}, "joined": {}}
        return State(dict(initial), record=record)

    def register(self, state: State, site: Participant, initial: Params) -> State:
        """The state once a site has joined: its new adapters are there, and nothing else has changed.

        A new slot of a known modality starts as the mean of that modality's slots. A site that comes back after it has
        trained the encoder brings its own part along, so it needs no warm start; its update is ramped in again.
        """
        returns = site.name in state.record["agreement"]
        before = state.record["joined"].get(site.name, {"own": []})
        new = {name: initial[name] for name in site.wire_shapes if name not in state.params}
        params = {**state.params, **{name: _slot_mean(name, state.params, tensor) for name, tensor in new.items()}}
        entry = {"warm": 0 if returns else _WARM_START, "counted": 0, "own": sorted({*new, *before["own"]})}
        return replace(
            state, params=params, record={**state.record, "joined": {**state.record["joined"], site.name: entry}}
        )

    def payload(self, state: State, site: Participant) -> Payload:
        """What a site exchanges; of a site in its warm start all is frozen but the adapters that came with it."""
        payload = super().payload(state, site)
        joined = state.record["joined"].get(site.name)
        if joined is None or joined["warm"] == 0:
            return payload
        return replace(payload, frozen=frozenset(payload.tensors) - set(joined["own"]))

    def aggregate(self, state: State, updates: Mapping[str, Update]) -> State:
        """One step of the server's optimiser along the conflict-averse direction.

        Sites in their warm start send no encoder tensors and so have no part in it.

        Raises:
          ParameterError: If there is no update, or one of the encoder is not finite.
        """
        if not updates:
            raise ParameterError("FedCMT: no update to aggregate")
        encoders = {
            site: Selection(u.delta, [n for n in u.delta if not _is_group(n)]) for site, u in sorted(updates.items())
        }
        encoders = {site: tensors for site, tensors in encoders.items() if tensors}
        direction, record, curves = self._encoder_direction(state, updates, encoders)
        direction |= self._adapter_means(state, updates, trained=encoders)
        round_idx, num_rounds = state.record["round"], state.record["num_rounds"]
        params, memory = self.optimizer.step(state.params, direction, state.memory, round_idx, num_rounds)
        curves |= _step_curves(state.params, params, encoders)
        logger.debug("%s", ", ".join(f"{name} {value:.4g}" for name, value in sorted(curves.items())))
        joined = _after_round(record["joined"], updates, trained=encoders)
        return State(params, memory, {**record, "round": round_idx + 1, "joined": joined, "curves": curves})

    def needs_teacher(self, round_idx: int, num_rounds: int) -> bool:
        """Whether the round distils: not in round 0, nor where the coefficient is negligible."""
        return self.distillation.coefficient(round_idx, num_rounds) > 0

    def local_loss(self, loss: Tensor, step: LocalStep) -> Tensor:
        """The task's loss and, weighted, how far the predictions have moved from those of the received model."""
        coefficient = self.distillation.coefficient(step.round_idx, step.num_rounds)
        if coefficient == 0:
            return loss
        teacher = step.teacher()
        term = self.distillation.divergence(step.logits, teacher, regions=step.regions, valid=step.valid)
        if self.distillation.gate:
            term = term * self.distillation.trust(teacher, step.target, regions=step.regions, valid=step.valid)
        return loss + coefficient * term

    def _encoder_direction(
        self, state: State, updates: Mapping[str, Update], encoders: Mapping[str, Tensors]
    ) -> tuple[Params, dict, dict[str, float]]:
        """The direction, the record with the new agreements, and the round's curves."""
        if not encoders:
            return {}, state.record, {}
        gram = GramMatrix()
        for site, encoder in encoders.items():
            gram.add(site, encoder)
        matrix = _without_zeros(gram)
        encoders = {site: encoders[site] for site in gram.sites}
        preference = self._preference(state, {site: updates[site] for site in gram.sites})
        agreement = leave_one_out_agreement(matrix, preference)
        radius = self.radius if self.adaptive_radius is None else self.adaptive_radius * (1 - float(agreement.mean()))
        direction = self._direction(gram, encoders, preference, radius)
        running, now = state.record["agreement"], dict(zip(gram.sites, agreement.tolist(), strict=True))
        running = {**running, **{s: _EMA * running.get(s, _FIRST_AGREEMENT) + (1 - _EMA) * now[s] for s in now}}
        curves = {"radius": radius, **_site_curves(gram.sites, matrix, preference, agreement)}
        return direction, {**state.record, "agreement": running}, curves

    def _adapter_means(self, state: State, updates: Mapping[str, Update], trained: Collection[str]) -> Params:
        """Per adapter tensor the mean over the sites that sent it; they are too small for conflicts.

        Sites in their warm start (not in ``trained``) are weighed among themselves and do not shift the weights of the
        others; where both sent a tensor, the two groups count by their cases.
        """
        groups = {
            site: replace(u, delta=Selection(u.delta, [n for n in u.delta if _is_group(n)]))
            for site, u in updates.items()
        }
        weights: dict[str, float] = {}
        founders = {site: u for site, u in updates.items() if site in trained}
        newcomers = {site: u for site, u in updates.items() if site not in trained}
        for members in filter(None, (founders, newcomers)):
            scale = self._cases(members) / self._cases(founders or members)
            shares = self._preference(state, members).tolist()
            weights |= {site: scale * share for site, share in zip(sorted(members), shares, strict=True)}
        return weighted_mean(groups, weights)

    def _cases(self, updates: Mapping[str, Update]) -> float:
        return sum(float(update.num_cases) ** self.case_exponent for update in updates.values())

    def _preference(self, state: State, updates: Mapping[str, Update]) -> np.ndarray:
        """p_i ∝ |D_i|^q s_i^β ρ_i, from three sites on at most the largest share; sums to 1.

        Each is at least the smallest share of 1/N before all are scaled to sum to 1 again, so at least
        smallest / (1 + smallest) of 1/N in the end. In the order of site names; ρ ramps in sites that have joined.
        """
        sites, agreements = sorted(updates), state.record["agreement"]
        cases = np.array([updates[site].num_cases for site in sites], dtype=np.float64)
        agreement = _of_order_one(np.array([agreements.get(site, _FIRST_AGREEMENT) for site in sites]))
        ramp = np.array([_ramp(state.record, site) for site in sites])
        share = cases**self.case_exponent * agreement**self.agreement_exponent * ramp
        share /= share.sum()
        largest = int(share.argmax())
        if len(sites) >= 3 and share[largest] > self.largest_share:
            others = np.arange(len(sites)) != largest
            # Their own sum: 1 - share[largest] is 0 where they are lost in rounding.
            share[others] *= (1 - self.largest_share) / share[others].sum()
            share[largest] = self.largest_share
        share = np.maximum(share, self.smallest_share / len(sites))
        return share / share.sum()

    def _direction(
        self, gram: GramMatrix, encoders: Mapping[str, Tensors], preference: np.ndarray, radius: float
    ) -> Params:
        """Σ v_i Δ_i, with v solved for the whole encoder or block by block."""
        direction: Params = {}
        names = list(next(iter(encoders.values())))
        for block in _blocks(names, self.granularity):
            whole = len(block) == len(names)
            matrix = gram.matrix(block)
            solution = solve(matrix, preference, radius, self.normalisation, count_dropped=not whole)
            if solution.gap > _LARGEST_GAP:
                logger.warning(
                    "conflict-averse direction of %s: relative gap %.1e to the best after %d steps",
                    block[0] if not whole else "the encoder",
                    solution.gap,
                    solution.iterations,
                )
            if solution.pareto_stationary:
                logger.info(
                    "no direction helps every site (%s): the mean is taken", block[0] if not whole else "encoder"
                )
            coefficients = rescale(solution.coefficients, radius, self.rescale)
            direction |= combine(encoders, coefficients, block)
        return direction


def _without_zeros(gram: GramMatrix) -> np.ndarray:
    """The matrix over the encoder; sites whose update is zero are dropped, unless all are."""
    matrix = gram.matrix()
    zero = [gram.sites[i] for i in negligible(matrix)]
    if not zero or len(zero) == len(matrix):
        return matrix
    logger.warning("zero updates left out: %s", zero)
    for site in zero:
        gram.drop(site)
    return gram.matrix()


def _is_group(name: str) -> bool:
    return "@" in name


def _blocks(names: Sequence[str], granularity: Granularity) -> list[list[str]]:
    if granularity == "whole":
        return [list(names)]
    if granularity == "tensor":
        return [[name] for name in names]
    stages: dict[str, list[str]] = {}
    for name in names:
        found = _STAGE.match(name)
        stages.setdefault(found[0] if found else "", []).append(name)
    return list(stages.values())


def _slot_mean(name: str, params: Params, otherwise: Tensor) -> Tensor:
    """The mean of the slots that this one's parameter already has in its modality; ``otherwise`` if there is none."""
    parameter, _, slot = name.partition("@")
    modality = slot.partition(".")[0]
    known = [tensor for other, tensor in params.items() if other.startswith(f"{parameter}@{modality}.")]
    return torch.stack(known).mean(0) if known and "." in slot else otherwise


def _of_order_one(values: np.ndarray) -> np.ndarray:
    """Values >= 0 in units of a power of 2 that brings the largest into [0.5, 1), so that no power of it vanishes.

    Sites that never agree halve their agreement every seven rounds. A power of 2 leaves shares as they are, to the bit
    where the exponent is 1.
    """
    values = np.maximum(values, np.finfo(np.float64).tiny)
    return np.ldexp(values, -np.frexp(values.max())[1])


def _ramp(record: Mapping[str, Any], site: str) -> float:
    """ρ: 1 for founders; for a site that joined, a fifth in its first round with an encoder update, then two, …"""
    joined = record["joined"].get(site)
    return 1.0 if joined is None else min(1.0, (joined["counted"] + 1) / _RAMP)


def _after_round(
    joined: Mapping[str, dict[str, Any]], updates: Collection[str], trained: Collection[str]
) -> dict[str, dict[str, Any]]:
    """The sites that joined, once more with what the round was to them: one that was absent in it is where it was."""
    after = {site: dict(entry) for site, entry in joined.items()}
    for site in set(after) & set(updates):
        if site in trained:
            after[site]["counted"] += 1
        else:
            after[site]["warm"] = max(0, after[site]["warm"] - 1)
    return after


def _site_curves(
    sites: Sequence[str], matrix: np.ndarray, preference: np.ndarray, agreement: np.ndarray
) -> dict[str, float]:
    """Norms, weights, agreements and pairwise cosines of a round; long updates beside short ones own the mean."""
    norms = np.sqrt(np.diagonal(matrix))
    curves: dict[str, float] = {}
    for i, site in enumerate(sites):
        curves |= {f"norm/{site}": norms[i], f"weight/{site}": preference[i], f"agreement/{site}": agreement[i]}
        for j in range(i + 1, len(sites)):
            if norms[i] and norms[j]:
                curves[f"cosine/{site}-{sites[j]}"] = matrix[i, j] / (norms[i] * norms[j])
    lengths = norms[norms > 0]
    if lengths.size:
        curves["norm_ratio"] = lengths.max() / lengths.min()
        if curves["norm_ratio"] > _LARGE_NORM_RATIO:
            logger.warning("the longest update is %.0f times the shortest", curves["norm_ratio"])
    return {name: float(value) for name, value in curves.items()}


def _step_curves(before: Params, after: Params, encoders: Mapping[str, Tensors]) -> dict[str, float]:
    """Length of the server's step over the encoder, and its cosine with each site's update: momentum may turn it away
    from a site that the direction itself still helps."""
    if not encoders:
        return {}
    names = list(next(iter(encoders.values())))
    step = {name: after[name] - before[name] for name in names}
    length = norm(step)
    curves = {"step_norm": length}
    for site, encoder in encoders.items():
        inner = sum(float(torch.dot(encoder[name].flatten(), step[name].flatten())) for name in names)
        if (scale := norm(encoder) * length) > 0:
            curves[f"step_cosine/{site}"] = inner / scale
    return curves


def _is_radius_or_none(value: object) -> bool:
    return value is None or (is_number(value) and 0 <= value < 1)
