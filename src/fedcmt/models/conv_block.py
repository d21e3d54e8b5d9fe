"""Convolution, normalisation, leaky ReLU: M-Unet's block, in two or three dimensions."""

import math
from collections import OrderedDict
from collections.abc import Mapping

from torch import nn

SLOPE = 0.2
"""Of the leaky ReLU."""

CONVOLUTIONS: Mapping[int, type[nn.Conv2d | nn.Conv3d]] = {2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED: Mapping[int, type[nn.ConvTranspose2d | nn.ConvTranspose3d]] = {
    2: nn.ConvTranspose2d,
    3: nn.ConvTranspose3d,
}
NORMS = ("instance", "group", "batch")

_INSTANCE = {2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}
_BATCH = {2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
_GROUPS = 8


def conv_block(dimensions: int, inputs: int, width: int, *, stride: int, norm: str) -> nn.Sequential:
    """A 3x3(x3) convolution with bias and padding 1, an affine norm, and a leaky ReLU: ``conv``, ``norm``, ``nonlin``.

    Args:
      dimensions: 2 or 3.
      inputs: Channels of the input.
      width: Channels of the output.
      stride: Of the convolution, on every axis; 2 halves even sides.
      norm: One of `NORMS`; "group" has 8 groups, or as many as divide both 8 and ``width``.
    """
    return nn.Sequential(
        OrderedDict(
            conv=CONVOLUTIONS[dimensions](inputs, width, kernel_size=3, stride=stride, padding=1),
            norm=_norm(dimensions, width, norm),
            nonlin=nn.LeakyReLU(SLOPE, inplace=True),
        )
    )


def _norm(dimensions: int, width: int, kind: str) -> nn.Module:
    if kind == "instance":
        return _INSTANCE[dimensions](width, affine=True)
    if kind == "group":
        return nn.GroupNorm(math.gcd(_GROUPS, width), width)
    return _BATCH[dimensions](width)
