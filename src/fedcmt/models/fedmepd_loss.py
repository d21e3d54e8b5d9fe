"""FedMEPD's loss: weighted cross-entropy and soft Dice of every output, added up.

After the code of Liu et al., Medical Image Analysis, 2025, https://arxiv.org/abs/2603.04887.
"""

import torch
from torch import Tensor
from torch.nn import functional

from fedcmt.models.fedmepd import Outputs

_LEAST_PROBABILITY = 0.005
_TINY = 1e-7


def fedmepd_loss(outputs: Outputs, target: Tensor) -> Tensor:
    """The plain sum of `loss_terms`, a scalar in float32."""
    return torch.stack(list(loss_terms(outputs, target).values())).sum()


def loss_terms(outputs: Outputs, target: Tensor) -> dict[str, Tensor]:
    """Cross-entropy plus Dice of the fused prediction, of each level's probability map and of each sequence alone.

    Args:
      outputs: Of `fedcmt.models.fedmepd.FedMEPDNet` in training with ``all_outputs``.
      target: [B, 1, *spatial], whole numbers from 0 to K - 1 of any type. There is no ignore label.

    Returns:
      ``fused``, ``map.1`` from full resolution down, and ``alone.SEQUENCE`` -> a scalar in float32.

    Raises:
      TypeError: If the network gave logits alone.
      ValueError: If the target is not one label per voxel.
    """
    if not isinstance(outputs, Outputs):
        raise TypeError(
            f"fedmepd_loss: a {type(outputs).__name__} from the network, expected its Outputs. Train a FedMEPDNet, and "
            "set all_outputs on it."
        )
    labels = _labels(outputs.logits, target)
    probabilities = {
        "fused": _softmax(outputs.logits),
        **{f"map.{level}": own.float() for level, own in enumerate(outputs.probability_maps, start=1)},
        **{f"alone.{sequence}": _softmax(own) for sequence, own in outputs.auxiliary.items()},
    }
    return {name: weighted_cross_entropy(own, labels) + dice_loss(own, labels) for name, own in probabilities.items()}


def weighted_cross_entropy(probabilities: Tensor, labels: Tensor) -> Tensor:
    """Mean over voxels of -w ln p of the true label, with p at least 0.005 and w = 1 - the label's share of its case.

    Args:
      probabilities: [B, K, *spatial].
      labels: [B, *spatial] of int64.
    """
    flat = labels.flatten(1)
    weight = 1 - functional.one_hot(flat, probabilities.shape[1]).sum(dim=1) / flat.shape[1]
    true = probabilities.flatten(2).gather(1, flat[:, None])[:, 0]
    return -(weight.gather(1, flat) * true.clamp(_LEAST_PROBABILITY, 1).log()).mean()


def dice_loss(probabilities: Tensor, labels: Tensor) -> Tensor:
    """1 - mean over all labels, background too, of 2 Σ p t / (Σ p + Σ t), sums over the voxels of the batch.

    A label that is nowhere has the Dice 0, so the loss is at least its share of the labels.

    Args:
      probabilities: [B, K, *spatial].
      labels: [B, *spatial] of int64.
    """
    reference = functional.one_hot(labels, probabilities.shape[1]).movedim(-1, 1)
    voxels = [axis for axis in range(probabilities.dim()) if axis != 1]
    common = (probabilities * reference).sum(voxels)
    return 1 - (2 * common / (probabilities.sum(voxels) + reference.sum(voxels) + _TINY)).mean()


def _softmax(logits: Tensor) -> Tensor:
    return logits.float().softmax(dim=1)


def _labels(logits: Tensor, target: Tensor) -> Tensor:
    if target.shape != (len(logits), 1, *logits.shape[2:]):
        raise ValueError(
            f"fedmepd_loss: target {tuple(target.shape)} for logits {tuple(logits.shape)}, expected one label per "
            "voxel of the same grid. Regions and several resolutions have no such target."
        )
    return target[:, 0].long()
