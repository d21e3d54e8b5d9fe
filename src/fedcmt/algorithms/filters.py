"""Filters that a site shares until it has disagreed about them for long: its patience and its weight, one by one.

After the code of FedMEPD: Liu et al., Medical Image Analysis, 2025, https://arxiv.org/abs/2603.04887. A filter is one
output channel of a convolution: row j of its weight, and element j of its bias, which goes wherever the row goes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedcmt.params import ParameterError

_TINY = 1e-12
"""Changes of a smaller norm point nowhere."""
_MOST_PATIENCE = torch.iinfo(torch.int16).max


@dataclass(frozen=True)
class Filters:
    """One site's filters of one convolution, F of them.

    Attributes:
      patience: c [F], int16: in how many more rounds running the site may disagree; 0 is personal, for ever.
      weight: H [F], float64, at least 0: how much the site's change of a filter counts; 0 where it is personal.
    """

    patience: Tensor
    weight: Tensor

    @staticmethod
    def fresh(count: int, patience: int | None) -> "Filters":
        """Filters of a site before its first round: all shared, with H = 1, or all personal if ``patience`` is 0.

        Args:
          count: F.
          patience: P, or None if filters stay shared whatever comes.
        """
        left = 1 if patience is None else patience
        weight = 1.0 if left else 0.0
        return Filters(torch.full((count,), left, dtype=torch.int16), torch.full((count,), weight, dtype=torch.float64))

    @property
    def federated(self) -> Tensor:
        """B [F], bool: which filters the site shares."""
        return self.patience > 0

    @property
    def rows(self) -> tuple[int, ...]:
        """Indices of the shared filters, rising."""
        return tuple(self.federated.nonzero().flatten().tolist())

    def judged(
        self, cosine: Tensor, ratio: Tensor, *, patience: int | None, share: float, smoothing: float
    ) -> "Filters":
        """The filters after one more round; those that are personal stay as they are.

        c falls by one where the cosine is negative, is P again where it is positive, and stays where it is zero.
        H becomes smoothing · H + (1 − smoothing) · share · ratio, and 0 where c has come down to 0.

        Args:
          cosine: Of the server's and the site's change, of each shared filter in the order of `rows`.
          ratio: Of their norms, likewise.
          patience: P, or None if c never falls.
          share: The site's share of all sites' cases, in (0, 1].
          smoothing: In [0, 1].
        """
        shared = self.federated
        left = self.patience[shared]
        if patience is not None:
            full = torch.full_like(left, patience)
            left = torch.where(cosine < 0, left - 1, torch.where(cosine > 0, full, left))
        weight = smoothing * self.weight[shared] + (1 - smoothing) * share * ratio
        weight = torch.where(left > 0, weight, torch.zeros_like(weight))
        return Filters(self.patience.masked_scatter(shared, left), self.weight.masked_scatter(shared, weight))


def is_patience(value: int) -> bool:
    """Whether counters can hold it."""
    return 0 <= value <= _MOST_PATIENCE


def convolutions(shapes: Mapping[str, Sequence[int]]) -> dict[str, int]:
    """Each convolution and how many filters it has, in the order of their names.

    Args:
      shapes: Name to shape of ``<convolution>.weight`` [F, ...] and, where there is one, ``<convolution>.bias`` [F].

    Raises:
      ParameterError: If tensors of one convolution have other lengths, or it has no weight.
    """
    found: dict[str, int] = {}
    for name in sorted(shapes):
        convolution = name.rpartition(".")[0]
        weight = shapes.get(f"{convolution}.weight", ())
        if not weight or not shapes[name] or shapes[name][0] != weight[0]:
            raise ParameterError(
                f"filters: {name} is {tuple(shapes[name])} beside a weight {tuple(weight)}, expected one row for each "
                "filter of the weight. The decoder must be made of convolutions alone."
            )
        found[convolution] = weight[0]
    return found


def compare(server: Tensor, site: Tensor, largest_ratio: float = 1000.0) -> tuple[Tensor, Tensor]:
    """Per filter, the cosine of two changes and ‖server‖ / ‖site‖.

    Args:
      server: Δ^s [n, ...].
      site: Δ^i, of the same shape.
      largest_ratio: Ratios are cut off here, also those to a norm of zero; 0 to 0 is 0.

    Returns:
      Cosines [n] in [-1, 1], 0 where either norm is below 1e-12; ratios [n] in [0, ``largest_ratio``]. Both float64 and
      finite.
    """
    ours, theirs = server.double().flatten(1), site.double().flatten(1)
    our_norm, their_norm = ours.norm(dim=1), theirs.norm(dim=1)
    known = (our_norm >= _TINY) & (their_norm >= _TINY)
    # The product first: that of float32 numbers is exact in double, so orthogonal changes give 0 and not a sign.
    cosine = (ours * theirs).sum(dim=1) / our_norm.clamp(min=_TINY) / their_norm.clamp(min=_TINY)
    ratio = (our_norm / their_norm.clamp(min=_TINY)).clamp(max=largest_ratio)
    return torch.where(known, cosine.clamp(-1, 1), torch.zeros_like(cosine)), ratio


def mean_change(members: Sequence[tuple[Filters, Tensor]]) -> Tensor:
    """Σ_i H_ij Δ_ij / Σ_i H_ij for each filter j, over the sites that share it; 0 where no site does.

    Args:
      members: At least one site's filters, and its change [number of shared filters, ...] of one tensor.

    Returns:
      [F, ...], float64.
    """
    first, change = members[0]
    count = len(first.patience)
    total = torch.zeros(count, dtype=torch.float64)
    weighted = torch.zeros(count, *change.shape[1:], dtype=torch.float64)
    for filters, own in members:
        shared = filters.federated
        rows = slice(None) if bool(shared.all()) else shared  # a mask copies, and for long most filters are shared
        weighted[rows] += _by_row(filters.weight[rows], own) * own.double()
        total += torch.where(shared, filters.weight, torch.zeros_like(total))
    divisor = _by_row(torch.where(total > 0, total, torch.ones_like(total)), weighted)
    return weighted / divisor


def _by_row(values: Tensor, tensor: Tensor) -> Tensor:
    """[n] in a shape that multiplies the rows of [n, ...]."""
    return values.view(-1, *[1] * (tensor.ndim - 1))
