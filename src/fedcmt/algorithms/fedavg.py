"""FedAvg: the mean of the sites' updates, weighted by their training cases.

McMahan et al., Communication-Efficient Learning of Deep Networks from Decentralized Data, AISTATS 2017,
https://arxiv.org/abs/1602.05629
"""

from collections.abc import Mapping
from dataclasses import replace

import torch

from fedcmt.algorithms.base import Algorithm, State, Update
from fedcmt.models.scopes import ALL_SHARED
from fedcmt.params import ParameterError, Params, check_names, check_shapes


class FedAvg(Algorithm):
    """Everything is shared; a site ends with the global model."""

    scopes = ALL_SHARED
    mean_only = True

    def aggregate(self, state: State, updates: Mapping[str, Update]) -> State:
        """``params + sum_i p_i delta_i`` with p_i proportional to the cases of site i (Algorithm 1)."""
        mean = weighted_mean(updates, {site: float(update.num_cases) for site, update in updates.items()})
        unknown = set(mean) - set(state.params)
        if unknown:
            check_names(set(state.params) | unknown, state.params, where="aggregate")
        check_shapes(mean, {n: tuple(state.params[n].shape) for n in mean}, where="aggregate")
        return replace(state, params={n: t + mean[n] if n in mean else t for n, t in state.params.items()})


def weighted_mean(updates: Mapping[str, Update], weights: Mapping[str, float]) -> Params:
    """Per tensor, the mean over the sites that sent it, with their weights renormalised to sum to 1.

    Group tensors come from the sites of one modality or slot only, so each tensor has its own set of contributors. Sums
    run in float64 and in the order of site names, so arrival order changes nothing.

    Raises:
      ParameterError: If there is no update, or a weight is not positive.
    """
    if not updates:
        raise ParameterError("weighted_mean: no update to average")
    bad = {site: weights[site] for site in updates if not weights[site] > 0}
    if bad:
        raise ParameterError(
            f"weighted_mean: weights must be positive, got {bad}; a site without cases cannot take part"
        )
    mean: Params = {}
    for name in sorted({name for update in updates.values() for name in update.delta}):
        senders = sorted(site for site in updates if name in updates[site].delta)
        total = sum(weights[site] for site in senders)
        first = updates[senders[0]].delta[name]
        shapes = {site: tuple(updates[site].delta[name].shape) for site in senders}
        if len(set(shapes.values())) > 1:
            raise ParameterError(f"weighted_mean: {name} has different shapes: {shapes}")
        acc = torch.zeros(first.shape, dtype=torch.float64)
        for site in senders:
            acc += updates[site].delta[name].double() * (weights[site] / total)
        mean[name] = acc.to(first.dtype)
    return mean
