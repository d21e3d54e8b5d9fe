"""Trimmed mean: per weight, the mean over sites without the largest and the smallest values.

Yin et al., Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates, ICML 2018,
https://arxiv.org/abs/1803.01498 (Algorithm 1, option II, and definition 2).
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch

from fedcmt.algorithms.base import Algorithm, Participant, State, Update
from fedcmt.models.scopes import ALL_SHARED
from fedcmt.params import ParameterError, Params, check_shapes, shapes
from fedcmt.settings import is_int, is_number, require


class TrimmedMean(Algorithm):
    """Everything is shared; a site ends with the global model. Every site counts alike, whatever its cases.

    Args:
      trim: Values left out on each side of every weight: a whole number from 1, or a fraction β in (0, 0.5) of the
        sites that sent the tensor, rounded down. Up to that many sites may send anything: no weight then leaves the
        range of the other sites' values.

    Raises:
      ValueError: If the trim is out of range.
    """

    scopes = ALL_SHARED

    def __init__(self, trim: float = 1) -> None:
        fraction = is_number(trim) and 0 < trim < 0.5
        expected = "a whole number from 1, or a fraction in (0, 0.5)"
        require(fraction or (is_int(trim) and trim >= 1), "TrimmedMean", "trim", trim, expected)
        self.trim = trim

    def init(self, initial: Params, sites: Sequence[Participant], num_rounds: int) -> State:
        """The state before round 0.

        Raises:
          ParameterError: If a tensor has too few sites for the trim.
        """
        for name, owners in num_owners(sites).items():
            self._count(name, owners)
        return super().init(initial, sites, num_rounds)

    def aggregate(self, state: State, updates: Mapping[str, Update]) -> State:
        """``params`` plus the trimmed mean of the updates.

        Raises:
          ParameterError: If too few sites for the trim sent a tensor.
        """
        return moved(state, trimmed_means(updates, self._count))

    def _count(self, name: str, senders: int) -> int:
        """Values to leave out on each side of a tensor that so many sites send."""
        # The summand keeps a product such as 0.29 * 100 from falling below the whole number it stands for.
        count = self.trim if is_int(self.trim) else math.floor(self.trim * senders + 1e-9)
        if count < 1 or 2 * count >= senders:
            raise ParameterError(
                f"TrimmedMean: trim {self.trim} leaves out {count} on each side of {name}, which {senders} sites "
                "exchange; expected at least one on each side and one that stays. Change trim, or take more sites."
            )
        return count


def num_owners(sites: Sequence[Participant]) -> Counter[str]:
    """Wire name to the number of sites that exchange it."""
    return Counter(name for site in sites for name in site.wire_shapes)


def trimmed_means(updates: Mapping[str, Update], count_of: Callable[[str, int], int]) -> Params:
    """Per tensor and element, the plain mean over the sites that sent it, without the values at both ends.

    Means run in float64 over sorted values, so the order of sites changes nothing. One tensor of all its senders is in
    memory at a time.

    Args:
      updates: By site.
      count_of: (wire name, number of senders) -> how many values to leave out on each side; fewer than half of them.

    Raises:
      ParameterError: If there is no update, or sites sent different shapes.
    """
    if not updates:
        raise ParameterError("trimmed_means: no update to average")
    means: Params = {}
    for name in sorted({name for update in updates.values() for name in update.delta}):
        values = {site: update.delta[name] for site, update in sorted(updates.items()) if name in update.delta}
        if len({tensor.shape for tensor in values.values()}) > 1:
            raise ParameterError(f"trimmed_means: {name} has different shapes: {shapes(values)}")
        count = count_of(name, len(values))
        ordered = torch.stack(list(values.values())).sort(dim=0).values[count : len(values) - count]
        means[name] = ordered.double().mean(dim=0).to(ordered.dtype)
    return means


def moved(state: State, direction: Params) -> State:
    """The state with ``direction`` added to its tensors.

    Raises:
      ParameterError: If the direction has a name or a shape that the state has not.
    """
    held = {name: tensor for name, tensor in state.params.items() if name in direction}
    check_shapes(direction, shapes(held), where="aggregate")
    return replace(state, params={n: t + direction[n] if n in direction else t for n, t in state.params.items()})
