"""FedMEPD's anchors: what features of each class look like where all sequences are there.

After the code of Liu et al., Medical Image Analysis, 2025, https://arxiv.org/abs/2603.04887. The site with full data
takes a prototype of each class from every case, clusters them once, and from then on follows the clusters' means:

1. `case_prototypes` of every batch it trains on, `mean_prototypes` for a case it saw more than once,
2. `first_anchors` after the warm-up round: the centroids of each level, for the next round alone, and the clusters that
   each class of each case belongs to, from the lowest level, for ever,
3. `updated_anchors` after each further round: the members' mean the first time, a moving average from then on.

Levels count from 1 at full resolution. Anchors may travel; clusters hold case ids and stay at the site that made them.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from fedcmt.params import ParameterError, Params

logger = logging.getLogger(__name__)

DECAY = 0.999
"""ω of the moving average."""

_TINY = 1e-5
_ITERATIONS = 30
_STARTS = 10
_PREFIX = "anchors."


@dataclass(frozen=True)
class CasePrototypes:
    """A case's mean features of each class.

    Attributes:
      levels: Level to [K, C_l], float32 on the CPU.
      present: [K], whether the class was in the patch; rows of others mean nothing.
    """

    levels: Mapping[int, Tensor]
    present: Tensor


@dataclass(frozen=True)
class Clusters:
    """The cluster that each case belongs to, of one class.

    Attributes:
      of_case: Case id to its cluster, from 0 up without a gap; without a case if the class has not been seen.
      settled: Per cluster, whether its anchors have been the mean of its members at least once.
    """

    of_case: Mapping[str, int]
    settled: tuple[bool, ...]


@dataclass(frozen=True)
class Anchors:
    """Anchors of all levels and how they came about.

    Attributes:
      levels: Level to A_l [anchors per class * K, C_l], float32 on the CPU; row ``cluster * K + class``. A class that
        has fewer clusters than anchors repeats them in turn; one that has not been seen yet has rows of zeros.
      clusters: Per class.
      seed: Of the clustering.
    """

    levels: Mapping[int, Tensor]
    clusters: tuple[Clusters, ...]
    seed: int

    def tensors(self) -> Params:
        """The anchors under the names that `fedcmt.models.fedmepd.FedMEPDNet` gives them."""
        return {f"{_PREFIX}{level}": rows for level, rows in self.levels.items()}

    def record(self) -> dict[str, Any]:
        """The rest as plain values for JSON."""
        clusters = [{"of_case": dict(own.of_case), "settled": list(own.settled)} for own in self.clusters]
        return {"clusters": clusters, "seed": self.seed}

    @staticmethod
    def restored(tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> "Anchors":
        """The anchors from what `tensors` and `record` gave.

        Raises:
          ParameterError: If there are other tensors among them.
        """
        foreign = sorted(name for name in tensors if not name.removeprefix(_PREFIX).isdecimal())
        if foreign or not tensors:
            raise ParameterError(f"anchors: tensors {foreign or 'none'}, expected names such as {_PREFIX}1.")
        clusters = tuple(Clusters(dict(own["of_case"]), tuple(own["settled"])) for own in record["clusters"])
        levels = {int(name.removeprefix(_PREFIX)): rows for name, rows in tensors.items()}
        return Anchors(levels, clusters, record["seed"])


@torch.no_grad()
def case_prototypes(features: Sequence[Tensor], labels: Tensor, num_classes: int) -> list[CasePrototypes]:
    """Each class's mean features over its voxels, per case of a batch: Σ F 1[y = k] / (Σ 1[y = k] + 1e-5).

    A voxel of level l stands for the 2^(l-1) voxels per axis that it was made from, as if features were enlarged to the
    labels' grid by the nearest.

    Args:
      features: F_l [B, C_l, *spatial / 2^(l-1), odd lengths upwards] of each level, from full resolution down, before
        calibration.
      labels: [B, 1, *spatial], whole numbers from 0 to K - 1 of any type.
      num_classes: K.

    Raises:
      ParameterError: If a level's size is another.
    """
    # Double also because autocast leaves it alone: half has no range for sums over a volume.
    voxels = functional.one_hot(labels[:, 0].long(), num_classes).movedim(-1, 1).double()
    present = voxels.flatten(2).any(dim=2).cpu()
    total = voxels.flatten(2).sum(dim=2)[..., None]
    levels = {}
    for level, own in enumerate(features, start=1):
        counts = _counts(voxels, 2 ** (level - 1))
        if own.shape[2:] != counts.shape[2:]:
            raise ParameterError(
                f"case_prototypes: features {tuple(own.shape)} of level {level}, expected {tuple(counts.shape[2:])} "
                f"voxels for labels {tuple(labels.shape)}."
            )
        sums = counts.flatten(2) @ own.double().flatten(2).transpose(1, 2)
        levels[level] = (sums / (total + _TINY)).float().cpu()
    return [CasePrototypes({level: own[i] for level, own in levels.items()}, present[i]) for i in range(len(labels))]


def mean_prototypes(draws: Sequence[CasePrototypes]) -> CasePrototypes:
    """One case's prototypes from several patches: each class's mean over the patches that hold it."""
    present = torch.stack([draw.present for draw in draws])
    weights = present / present.sum(dim=0).clamp(min=1)
    levels = {
        level: (torch.stack([draw.levels[level] for draw in draws]) * weights[..., None]).sum(dim=0)
        for level in draws[0].levels
    }
    return CasePrototypes(levels, present.any(dim=0))


def first_anchors(prototypes: Mapping[str, CasePrototypes], anchors_per_class: int = 4, seed: int = 0) -> Anchors:
    """The anchors of the round after the warm-up, and the clusters of all rounds.

    Args:
      prototypes: Case id to its prototypes.
      anchors_per_class: Clusters of each class, fewer if it has fewer distinct prototypes.
      seed: Of k-means.

    Raises:
      ParameterError: If there is no case.
    """
    if not prototypes or anchors_per_class < 1:
        raise ParameterError(
            f"first_anchors: {len(prototypes)} cases and {anchors_per_class} anchors per class, expected at least 1 of "
            "each. Train the warm-up round on cases with all sequences first."
        )
    first = next(iter(prototypes.values()))
    num_classes = len(first.present)
    levels = {level: torch.zeros(anchors_per_class * num_classes, own.shape[1]) for level, own in first.levels.items()}
    unseen = Anchors(levels, (Clusters({}, ()),) * num_classes, seed)
    anchors = _with_new_classes(unseen, prototypes)
    if missing := [k for k, own in enumerate(anchors.clusters) if not own.of_case]:
        logger.warning("no case shows the classes %s: their anchors are zero until one does", missing)
    return anchors


def updated_anchors(anchors: Anchors, prototypes: Mapping[str, CasePrototypes], decay: float = DECAY) -> Anchors:
    """Anchors after one more round: the mean over a cluster's members, or decay * old + (1 - decay) * mean if settled.

    A cluster that shows no member this round keeps its anchors. Cases that were not clustered count for nothing. A
    class that is there for the first time is clustered now.

    Args:
      anchors: Of the round before.
      prototypes: Case id to its prototypes in this round.
      decay: ω in [0, 1].
    """
    levels = {level: rows.clone() for level, rows in anchors.levels.items()}
    clusters = []
    for k, own in enumerate(anchors.clusters):
        settled = list(own.settled)
        for cluster in range(len(settled)):
            members = [
                prototypes[case]
                for case, number in sorted(own.of_case.items())
                if number == cluster and case in prototypes and prototypes[case].present[k]
            ]
            if not members:
                continue
            for level, rows in levels.items():
                mean = torch.stack([member.levels[level][k] for member in members]).mean(dim=0)
                chosen = _of_class(rows, k, anchors)[cluster :: len(settled)]
                chosen.copy_(decay * chosen + (1 - decay) * mean if settled[cluster] else mean)
            settled[cluster] = True
        clusters.append(replace(own, settled=tuple(settled)))
    return _with_new_classes(Anchors(levels, tuple(clusters), anchors.seed), prototypes)


def _with_new_classes(anchors: Anchors, prototypes: Mapping[str, CasePrototypes]) -> Anchors:
    """Anchors and clusters of the classes too that had none and are there now."""
    levels = {level: rows.clone() for level, rows in anchors.levels.items()}
    clusters = list(anchors.clusters)
    for k, own in enumerate(anchors.clusters):
        cases = [case for case in sorted(prototypes) if prototypes[case].present[k]]
        if own.of_case or not cases:
            continue
        for level, rows in levels.items():
            points = torch.stack([prototypes[case].levels[level][k] for case in cases])
            chosen = _of_class(rows, k, anchors)
            centroids, labels = _k_means(points.double().numpy(), len(chosen), anchors.seed)
            chosen.copy_(torch.from_numpy(centroids[np.arange(len(chosen)) % len(centroids)]))
            if level == max(levels):
                of_case = dict(zip(cases, labels.tolist(), strict=True))
                clusters[k] = Clusters(of_case, (False,) * len(centroids))
    return Anchors(levels, tuple(clusters), anchors.seed)


def _k_means(points: np.ndarray, clusters: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Centroids [K', C] and each point's cluster, K' at most the number of distinct points."""
    from sklearn.cluster import KMeans  # here: the import takes a second, and every process imports the algorithms

    distinct = len(np.unique(points, axis=0))
    found = KMeans(min(clusters, distinct), n_init=_STARTS, max_iter=_ITERATIONS, random_state=seed).fit(points)
    return found.cluster_centers_, found.labels_


def _of_class(rows: Tensor, k: int, anchors: Anchors) -> Tensor:
    """A view of one class's rows, by cluster."""
    return rows[k :: len(anchors.clusters)]


def _counts(voxels: Tensor, factor: int) -> Tensor:
    """How many of ``factor``³ voxels are 1, by blocks; past the end there are none."""
    over = [(-length) % factor for length in voxels.shape[:1:-1]]
    padding = [amount for end in over for amount in (0, end)]
    return functional.avg_pool3d(functional.pad(voxels, padding), factor) * factor**3
