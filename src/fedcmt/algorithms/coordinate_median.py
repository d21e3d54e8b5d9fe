"""Coordinate-wise median: per weight, the median of the sites' updates.

Yin et al., Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates, ICML 2018,
https://arxiv.org/abs/1803.01498 (Algorithm 1, option I, and definition 1).
"""

from collections.abc import Mapping, Sequence

from fedcmt.algorithms.base import Algorithm, Participant, State, Update
from fedcmt.algorithms.trimmed_mean import moved, num_owners, trimmed_means
from fedcmt.models.scopes import ALL_SHARED
from fedcmt.params import ParameterError, Params

_FEWEST = 3
"""Of two values the median is the mean."""


class CoordinateMedian(Algorithm):
    """Everything is shared; a site ends with the global model. Every site counts alike, whatever its cases.

    As long as fewer than half of the sites send anything else than they should, no weight leaves the range of the other
    sites' values. A round in which only one or two sites answer has their mean, which bounds nobody.
    """

    scopes = ALL_SHARED

    def init(self, initial: Params, sites: Sequence[Participant], num_rounds: int) -> State:
        """The state before round 0.

        Raises:
          ParameterError: If fewer than three sites exchange a tensor: its median would be the mean.
        """
        few = {name: owners for name, owners in num_owners(sites).items() if owners < _FEWEST}
        if few:
            name, owners = min(few.items())
            raise ParameterError(
                f"CoordinateMedian: {len(few)} tensors, e.g. {name}, are exchanged by fewer than {_FEWEST} sites "
                f"({owners}); their median is the mean and bounds nobody. Take more sites, or FedAvg."
            )
        return super().init(initial, sites, num_rounds)

    def aggregate(self, state: State, updates: Mapping[str, Update]) -> State:
        """``params`` plus the median of the updates; of an even number of sites, the mean of the two in the middle."""
        return moved(state, trimmed_means(updates, lambda name, senders: (senders - 1) // 2))
