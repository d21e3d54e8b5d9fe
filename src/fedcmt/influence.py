"""Bounding what one site can do to a round: updates are scaled down to a multiple of the median of their sizes.

Clipping as in Sun et al., Can You Really Backdoor Federated Learning?, 2019, https://arxiv.org/abs/1911.07963, with a
bound from the round itself: half of the sites would have to be oversized to move it.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from statistics import median

import torch

from fedcmt.algorithms.base import Update
from fedcmt.params import Tensors
from fedcmt.settings import is_number, require

FEWEST_SITES = 3
"""Of two sizes the median is their mean, so the larger one would set its own bound."""


def influence_factors(updates: Mapping[str, Update], ratio: float) -> dict[str, float]:
    """What to multiply each site's update with, in [0, 1], so that it is nowhere oversized.

    Sites may send different tensors (groups, frozen ones), so sizes are compared part by part: a part is the tensors
    that the same sites sent, and a site's size in it the root mean square over its elements. Where all sites send the
    same, that is one part, and the ratio of sizes is the ratio of 2-norms; where they send different numbers of rows,
    it is fair to both. A site's factor is the least of its parts', so that its update keeps its direction.

    A part of one sender has nothing to be compared with: it keeps its size, and no other site receives it. Of two
    senders the median is the mean, so a part of theirs is bounded for ratios below 2 only. A part in which at least
    half of the sizes are zero sets no bound.

    Args:
      updates: By site; finite. Read once, tensor by tensor.
      ratio: Largest size in units of the part's median, >= 1.

    Raises:
      ValueError: If the ratio is below 1.
    """
    require(is_number(ratio) and ratio >= 1, "influence_factors", "ratio", ratio, "a number from 1")
    factors = dict.fromkeys(sorted(updates), 1.0)
    for sizes in _sizes_by_part(updates):
        bound = ratio * median(sizes.values())
        for site, size in sizes.items():
            if size > bound > 0:
                factors[site] = min(factors[site], bound / size)
    return factors


def scale_updates(
    updates: Mapping[str, Update],
    factors: Mapping[str, float],
    keep: Callable[[str, Tensors], Tensors],
) -> dict[str, Update]:
    """The updates, those with a factor below 1 scaled by it.

    Extras stay as they are: what they mean is the algorithm's matter.

    Args:
      updates: By site; left as they are.
      factors: Of `influence_factors`.
      keep: (site, scaled tensors) -> where to hold them, e.g. on disk; one site at a time.
    """
    return {
        site: update
        if factors[site] == 1
        else replace(update, delta=keep(site, {name: tensor * factors[site] for name, tensor in update.delta.items()}))
        for site, update in updates.items()
    }


def _sizes_by_part(updates: Mapping[str, Update]) -> list[dict[str, float]]:
    """For each part, site to the root mean square of its elements."""
    parts: dict[tuple[str, ...], list[str]] = {}
    for name in sorted({name for update in updates.values() for name in update.delta}):
        senders = tuple(site for site in sorted(updates) if name in updates[site].delta)
        parts.setdefault(senders, []).append(name)
    return [{site: _size([updates[site].delta[name] for name in names]) for site in s} for s, names in parts.items()]


def _size(tensors: list[torch.Tensor]) -> float:
    elements = sum(tensor.numel() for tensor in tensors)
    squares = sum(float(torch.linalg.vector_norm(tensor, dtype=torch.float64)) ** 2 for tensor in tensors)
    return math.sqrt(squares / elements) if elements else 0.0
