"""The loss Fed-MUnet was published with: cross-entropy minus soft Dice at every scale.

Fed-MUnet, 2024, https://arxiv.org/abs/2409.01020, as its authors released it. nnU-Net's own differs: it gives the
lowest scale no weight and divides the weights by their sum.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

_SMOOTH = 1e-5
_TINY = 1e-8
"""Added to the denominator alone, as released."""


def published_loss(logits: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
    """Σ_i 2^-i (cross-entropy_i - soft Dice_i) over scales i, 0 at full resolution; weights are not normalised.

    Args:
      logits: [B, K, *spatial] per scale, from full resolution down; label 0 is background.
      targets: [B, 1, *spatial] per scale: whole numbers from 0 to K - 1 of any type. There is no ignore label.

    Returns:
      A scalar in float32. With five scales its lower bound is -(1 + 1/2 + 1/4 + 1/8 + 1/16) = -1.9375, which needs
      every label in every batch and at every scale.

    Raises:
      ValueError: If the scales do not pair up.
    """
    if len(logits) != len(targets) or not logits:
        raise ValueError(
            f"published_loss: logits at {len(logits)} scales and targets at {len(targets)}, expected as many, at least "
            "one. Train with deep supervision."
        )
    scales = [_at_one_scale(own.float(), target) for own, target in zip(logits, targets, strict=True)]
    return torch.stack([loss / 2**i for i, loss in enumerate(scales)]).sum()


def _at_one_scale(logits: Tensor, target: Tensor) -> Tensor:
    if target.shape != (len(logits), 1, *logits.shape[2:]):
        raise ValueError(
            f"published_loss: target {tuple(target.shape)} for logits {tuple(logits.shape)}, expected one label per "
            "voxel of the same grid."
        )
    labels = target[:, 0].long()
    return functional.cross_entropy(logits, labels) - _batch_dice(logits.softmax(dim=1), labels)


def _batch_dice(probabilities: Tensor, labels: Tensor) -> Tensor:
    """Mean soft Dice of the foreground labels, each counted over all voxels of the batch at once."""
    reference = functional.one_hot(labels, probabilities.shape[1]).movedim(-1, 1)
    voxels = [axis for axis in range(probabilities.dim()) if axis != 1]
    true_positive = (probabilities * reference).sum(voxels)
    wrong = (probabilities * (1 - reference)).sum(voxels) + ((1 - probabilities) * reference).sum(voxels)
    dice = (2 * true_positive + _SMOOTH) / (2 * true_positive + wrong + _SMOOTH + _TINY)
    return dice[1:].mean()
