"""From a map of class logits to one logit per class."""

import math

import torch
from torch import Tensor

SHARPNESS = 5.0
"""r of the published classification heads: 0 is the mean, infinity the maximum."""


def log_sum_exp_pool(logits: Tensor, sharpness: float = SHARPNESS) -> Tensor:
    """z_c = (1/r) ln mean_v exp(r x_cv): between the mean and the maximum over voxels, with gradient softmax(r x).

    Args:
      logits: [B, K, *spatial], any floating type; computed in float32 at least, so half precision cannot overflow.
      sharpness: r > 0.

    Returns:
      [B, K], float32 (float64 for float64 input).

    Raises:
      ValueError: If there is no voxel to pool over, or the sharpness is not positive.
    """
    if logits.ndim < 3 or logits.shape[2:].numel() == 0:
        raise ValueError(f"log_sum_exp_pool: logits {tuple(logits.shape)}, expected [B, K, *spatial] with voxels")
    if not sharpness > 0:
        raise ValueError(f"log_sum_exp_pool: sharpness is {sharpness!r}, expected a number above 0")
    flat = logits.flatten(2)
    flat = flat if flat.dtype == torch.float64 else flat.float()
    return (torch.logsumexp(sharpness * flat, dim=2) - math.log(flat.shape[2])) / sharpness
