"""The cross-modality module (CMM): one map from the maps of all modalities, by attention over their channels.

After Fed-MUnet, 2024, https://arxiv.org/abs/2409.01020, as its authors released it. The attention compares channels and
not positions, so its cost is linear in the number of voxels.
"""

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedcmt.models.conv_block import CONVOLUTIONS, conv_block

CMM_NORMS = ("none", "pre_ln")


class CrossModality(nn.Module):
    """Y = X + attention(X), Z = Y + feed_forward(Y), and a convolution block from Z to one modality's width.

    X are the maps of M modalities, stacked: D = M C channels.

    Args:
      modalities: M.
      width: C, channels of each modality's map and of the result.
      heads: Attention heads, a divisor of C; each has C / heads channels.
      dimensions: 2 or 3.
      norm: Of the last block, one of `fedcmt.models.conv_block.NORMS`.
      cmm_norm: "none", as released, or "pre_ln", as drawn in the paper's figure: a layer norm, over channels and
        positions, before attention and before the feed-forward part.
    """

    def __init__(
        self, modalities: int, width: int, heads: int, *, dimensions: int = 2, norm: str = "instance",
        cmm_norm: str = "none",
    ) -> None:  # fmt: skip
        super().__init__()
        stacked = modalities * width
        self.norm1 = _layer_norm(stacked, cmm_norm)
        self.attention = ChannelAttention(stacked, heads, width // heads, dimensions)
        self.norm2 = _layer_norm(stacked, cmm_norm)
        self.feed_forward = _feed_forward(stacked, dimensions)
        self.output = conv_block(dimensions, stacked, width, stride=1, norm=norm)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """The fused map [B, C, *spatial] of M maps of that shape."""
        stacked = torch.cat(tuple(maps), dim=1)
        stacked = stacked + self.attention(self.norm1(stacked))
        stacked = stacked + self.feed_forward(self.norm2(stacked))
        return self.output(stacked)


class ChannelAttention(nn.Module):
    """Attention of every channel of a head to every other, over maps to which a convolution has added positions.

    Queries, keys and values are linear in all stacked channels, so that each of their channels mixes all modalities.

    Args:
      width: D, channels of the input and of the result.
      heads: Attention heads h.
      head_width: Channels d of each head.
      dimensions: 2 or 3.
    """

    def __init__(self, width: int, heads: int, head_width: int, dimensions: int = 2) -> None:
        super().__init__()
        self.position = CONVOLUTIONS[dimensions](width, width, kernel_size=3, padding=1, groups=width, bias=False)
        self.query, self.key, self.value = (nn.Linear(width, heads * head_width, bias=False) for _ in range(3))
        self.temperature = _Temperature(heads)
        self.output = nn.Linear(heads * head_width, width)
        self._heads = heads

    def forward(self, maps: Tensor) -> Tensor:
        """[B, D, *spatial] to the same shape, without the residual."""
        tokens = self._tokens(maps)
        attended = self._weights(tokens) @ self._split(self.value(tokens))
        return self.output(attended.flatten(1, 2).transpose(1, 2)).transpose(1, 2).reshape(maps.shape)

    def weights(self, maps: Tensor) -> Tensor:
        """Attention [B, h, d, d] of maps [B, D, *spatial]: rows are channels of the keys, and each sums to 1."""
        return self._weights(self._tokens(maps))

    def _tokens(self, maps: Tensor) -> Tensor:
        """One token of D channels per position."""
        return (maps + self.position(maps)).flatten(2).transpose(1, 2)

    def _weights(self, tokens: Tensor) -> Tensor:
        query, key = (functional.normalize(self._split(linear(tokens)), dim=-1) for linear in (self.query, self.key))
        return self.temperature(key @ query.transpose(-2, -1)).softmax(dim=-1)

    def _split(self, tokens: Tensor) -> Tensor:
        """[B, positions, h d] to [B, h, d, positions]."""
        return tokens.transpose(1, 2).unflatten(1, (self._heads, -1))


class _Temperature(nn.Module):
    """One learnt factor per head; a module of its own, as gradients per example are taken layer by layer."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(heads, 1, 1))

    def forward(self, scores: Tensor) -> Tensor:
        return self.weight * scores


def _feed_forward(width: int, dimensions: int) -> nn.Sequential:
    """Four times as wide inside, with a depthwise convolution; no biases."""
    convolution, wide = CONVOLUTIONS[dimensions], 4 * width
    return nn.Sequential(
        OrderedDict(
            expand=convolution(width, wide, kernel_size=1, bias=False),
            nonlin1=nn.GELU(),
            depthwise=convolution(wide, wide, kernel_size=3, padding=1, groups=wide, bias=False),
            nonlin2=nn.GELU(),
            reduce=convolution(wide, width, kernel_size=1, bias=False),
        )
    )


def _layer_norm(width: int, kind: str) -> nn.Module:
    return nn.GroupNorm(1, width) if kind == "pre_ln" else nn.Identity()
