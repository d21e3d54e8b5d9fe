"""FedCMT: one federation over modalities and tasks, by scopes and a conflict-averse, adaptive server.

Zhang et al., FedCMT, IEEE Transactions on Medical Imaging, 2026. The first convolution block adapts each modality,
input channel by input channel (group scope); the rest of the encoder is common (shared); decoders belong to their sites
(personal). The server

1. weights sites by their cases and by how far they agree with the others (adaptive weights),
2. combines the encoder's updates so that the site that gains least gains most (conflict-averse), adapters as plain
   means over the sites that own them,
3. and hands the direction to an optimiser of its own (FedOpt).
"""

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

import numpy as np

from fedcmt.algorithms.base import Algorithm, Participant, State, Update
from fedcmt.algorithms.conflict_averse import (
    GramMatrix,
    Normalisation,
    combine,
    leave_one_out_agreement,
    rescale,
    solve,
)
from fedcmt.algorithms.fedavg import weighted_mean
from fedcmt.algorithms.fedopt import FEDCMT_SERVER, read_optimizer
from fedcmt.models.scopes import ADAPTER_ENCODER_DECODER
from fedcmt.params import Params

logger = logging.getLogger(__name__)

Granularity = Literal["whole", "stage", "tensor"]

_STAGE = re.compile(r"encoder\.(?:stem|stages\.\d+)")
_EMA = 0.9
_FIRST_AGREEMENT = 0.5
_FLOOR = 0.2
_CAP = 0.5


class FedCMT(Algorithm):
    """A site ends with its own personalised model: adapter, encoder and decoder after its last local training.

    Args:
      radius: c in [0, 1): how far the direction may leave the mean, as a fraction of its length. 0 is no conflict
        handling.
      rescale: 2 divides the direction by 1 + c (identical updates pass unchanged), 1 by 1 + c² (FedHCA2's code), 0 not.
      granularity: Where conflicts are weighed: over the whole encoder, per stage, or per tensor.
      normalisation: ``none``, ``unit`` or ``equalise``; see `solve`.
      case_exponent: q ≥ 0 in p_i ∝ |D_i|^q s_i^β; 0 gives sites equal weight.
      agreement_exponent: β ≥ 0; 0 switches the adaptive weights off.
      optimizer: Fields of `fedcmt.algorithms.fedopt.ServerOptimizer`; the published SGD 1.0, momentum 0.6, cosine to
        0.9 if not given.

    Raises:
      ValueError: If a setting is out of range.
      TypeError: If a field of the optimiser is unknown.
    """

    scopes = ADAPTER_ENCODER_DECODER
    product: ClassVar[Literal["received", "trained"]] = "trained"

    def __init__(
        self,
        radius: float = 0.4,
        rescale: Literal[0, 1, 2] = 2,
        granularity: Granularity = "whole",
        normalisation: Normalisation = "none",
        case_exponent: float = 1.0,
        agreement_exponent: float = 1.0,
        optimizer: Mapping[str, Any] | None = None,
    ) -> None:
        _require(0 <= radius < 1, "radius", radius, "in [0, 1)")
        _require(rescale in (0, 1, 2), "rescale", rescale, "0, 1 or 2")
        _require(granularity in ("whole", "stage", "tensor"), "granularity", granularity, "whole, stage or tensor")
        _require(
            normalisation in ("none", "unit", "equalise"), "normalisation", normalisation, "none, unit or equalise"
        )
        _require(case_exponent >= 0, "case_exponent", case_exponent, "at least 0")
        _require(agreement_exponent >= 0, "agreement_exponent", agreement_exponent, "at least 0")
        self.radius = radius
        self.rescale: Literal[0, 1, 2] = rescale
        self.granularity = granularity
        self.normalisation = normalisation
        self.case_exponent = case_exponent
        self.agreement_exponent = agreement_exponent
        self.optimizer = FEDCMT_SERVER if optimizer is None else read_optimizer(optimizer)

    def init(self, initial: Params, sites: Sequence[Participant], num_rounds: int) -> State:
        """The state before round 0; the record keeps each site's running agreement and the optimiser's clock."""
        return State(dict(initial), record={"round": 0, "num_rounds": num_rounds, "agreement": {}})

    def aggregate(self, state: State, updates: Mapping[str, Update]) -> State:
        """One step of the server's optimiser along the conflict-averse direction.

        Raises:
          ParameterError: If there is no update, or one is not finite.
        """
        encoders = {site: {n: t for n, t in u.delta.items() if not _is_group(n)} for site, u in updates.items()}
        gram = GramMatrix()
        for site in sorted(encoders):
            gram.add(site, encoders[site])
        matrix = gram.matrix()
        agreements = state.record["agreement"]
        preference = self._preference(gram.sites, updates, agreements)
        direction = self._direction(gram, encoders, preference)
        groups = {
            site: replace(u, delta={n: t for n, t in u.delta.items() if _is_group(n)}) for site, u in updates.items()
        }
        direction |= weighted_mean(groups, dict(zip(gram.sites, preference.tolist(), strict=True)))
        round_idx, num_rounds = state.record["round"], state.record["num_rounds"]
        params, memory = self.optimizer.step(state.params, direction, state.memory, round_idx, num_rounds)
        now = dict(zip(gram.sites, leave_one_out_agreement(matrix, preference).tolist(), strict=True))
        running = {s: _EMA * agreements.get(s, _FIRST_AGREEMENT) + (1 - _EMA) * now[s] for s in now}
        _log(gram.sites, matrix, preference, now)
        record = {**state.record, "round": round_idx + 1, "agreement": {**agreements, **running}}
        return State(params, memory, record)

    def _preference(
        self, sites: Sequence[str], updates: Mapping[str, Update], agreements: Mapping[str, float]
    ) -> np.ndarray:
        """p_i ∝ |D_i|^q s_i^β, at most a half from three sites on, at least a fifth of an equal share; sums to 1."""
        cases = np.array([updates[site].num_cases for site in sites], dtype=np.float64)
        agreement = np.array([agreements.get(site, _FIRST_AGREEMENT) for site in sites])
        share = cases**self.case_exponent * agreement**self.agreement_exponent
        share /= share.sum()
        largest = int(share.argmax())
        if len(sites) >= 3 and share[largest] > _CAP:
            share *= (1 - _CAP) / (1 - share[largest])
            share[largest] = _CAP
        share = np.maximum(share, _FLOOR / len(sites))
        return share / share.sum()

    def _direction(self, gram: GramMatrix, encoders: Mapping[str, Params], preference: np.ndarray) -> Params:
        """Σ v_i Δ_i, with v solved for the whole encoder or block by block."""
        direction: Params = {}
        names = list(next(iter(encoders.values())))
        for block in _blocks(names, self.granularity):
            whole = len(block) == len(names)
            matrix = gram.matrix(block)
            solution = solve(matrix, preference, self.radius, self.normalisation, count_dropped=not whole)
            if whole and solution.dropped:
                logger.warning("zero updates left out: %s", [gram.sites[i] for i in solution.dropped])
            if solution.pareto_stationary:
                logger.info(
                    "no direction helps every site (%s): the mean is taken", block[0] if not whole else "encoder"
                )
            coefficients = rescale(solution.coefficients, self.radius, self.rescale)
            direction |= combine(encoders, coefficients, block)
        return direction


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


def _log(sites: Sequence[str], matrix: np.ndarray, preference: np.ndarray, agreement: Mapping[str, float]) -> None:
    """Norms, weights, agreements and pairwise cosines of a round; long updates beside short ones own the mean."""
    norms = np.sqrt(np.diagonal(matrix))
    for i, site in enumerate(sites):
        logger.info("%s: norm %.4g, weight %.3f, agreement %.3f", site, norms[i], preference[i], agreement[site])
    with np.errstate(divide="ignore", invalid="ignore"):
        cosines = matrix / np.outer(norms, norms)
    logger.info("cosines %s", np.round(cosines[np.triu_indices(len(sites), 1)], 3).tolist())
    lengths = norms[norms > 0]
    if lengths.size and lengths.max() > 10 * lengths.min():
        logger.warning("the longest update is %.0f times the shortest", lengths.max() / lengths.min())


def _require(ok: bool, key: str, value: object, expected: str) -> None:
    if not ok:
        raise ValueError(f"FedCMT: {key} is {value!r}, expected {expected}")
