"""LACCA, localized adaptive calibration via cross-attention: a site's features, seen through anchors of all classes.

After FedMEPD: Liu et al., Medical Image Analysis, 2025, https://arxiv.org/abs/2603.04887.
"""

from torch import Tensor, nn
from torch.nn import functional


class Calibration(nn.Module):
    """Attention of every voxel to every anchor: output = W_o concat_h(softmax(F W_q (A W_k)ᵀ / √C) A W_v) + b_o.

    Each head is as wide as the features. There is no residual, and the order of anchors does not matter.

    Args:
      width: C, channels of features and anchors.
      heads: h.
      dropout: Of attention weights, in training.
    """

    def __init__(self, width: int, heads: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(width, heads * width) for _ in range(3))
        self.output = nn.Linear(heads * width, width)
        self._heads = heads
        self._dropout = dropout

    def forward(self, features: Tensor, anchors: Tensor) -> Tensor:
        """The calibrated features.

        Args:
          features: F [B, C, *spatial].
          anchors: A [R, C], keys and values of all voxels alike.

        Returns:
          [B, C, *spatial].
        """
        query = self._split(self.query(features.flatten(2).transpose(1, 2)))
        key, value = self._split(self.key(anchors)), self._split(self.value(anchors))
        # Written out: fused attention goes through its gradients key by key, and there are few keys for many voxels.
        weights = (query @ key.transpose(-2, -1) / anchors.shape[1] ** 0.5).softmax(dim=-1)
        attended = functional.dropout(weights, self._dropout, self.training) @ value
        calibrated = self.output(attended.transpose(-3, -2).flatten(2))
        return calibrated.transpose(1, 2).reshape(features.shape)

    def _split(self, tokens: Tensor) -> Tensor:
        """[..., N, h C] to [..., h, N, C]."""
        return tokens.unflatten(-1, (self._heads, -1)).transpose(-3, -2)
