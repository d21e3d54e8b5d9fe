"""Fusion of modalities class by class: where a class is likely, each modality has a weight of its own.

RFNet: Ding et al., Region-aware Fusion Network for Incomplete Multi-modal Brain Tumor Segmentation, ICCV 2021; here as
FedMEPD has it: Liu et al., Medical Image Analysis, 2025, https://arxiv.org/abs/2603.04887.
"""

import contextlib
from collections import OrderedDict
from typing import Literal

import torch
from torch import Tensor, nn

SLOPE = 0.2
"""Of every leaky ReLU."""

PaddingMode = Literal["zeros", "reflect"]
"""torch's names for what pads a convolution."""

_MAP_WIDTH = 16
_GATE_WIDTH = 128
_TINY = 1e-7


def block(
    inputs: int, width: int, *, kernel: int = 3, stride: int = 1, padding_mode: PaddingMode = "zeros"
) -> nn.Sequential:
    """Convolution with bias, instance norm without parameters, leaky ReLU: ``conv``, ``norm``, ``nonlin``.

    Args:
      inputs: Channels of the input.
      width: Channels of the output.
      kernel: 3, which is padded by 1, or 1.
      stride: Of the convolution, on every axis.
      padding_mode: What the padding holds.
    """
    padding = kernel // 2
    return nn.Sequential(
        OrderedDict(
            conv=nn.Conv3d(inputs, width, kernel, stride=stride, padding=padding, padding_mode=padding_mode),
            norm=nn.InstanceNorm3d(width),
            nonlin=nn.LeakyReLU(SLOPE, inplace=True),
        )
    )


class ProbabilityMap(nn.Module):
    """Class probabilities at one level, from the stacked features and, above the lowest level, the decoder's.

    Args:
      modalities: M.
      width: C, channels of each modality's features.
      num_classes: K.
      guided: Whether there are features of the decoder, of C channels.
      padding_mode: See `block`.
    """

    def __init__(
        self, modalities: int, width: int, num_classes: int, *, guided: bool, padding_mode: PaddingMode
    ) -> None:
        super().__init__()
        self.embed = nn.Sequential(
            block(modalities * width, width // 4, kernel=1),
            block(width // 4, width // 4, padding_mode=padding_mode),
            block(width // 4, width, kernel=1),
        )
        self.classify = nn.Sequential(
            block(2 * width if guided else width, _MAP_WIDTH, kernel=1), nn.Conv3d(_MAP_WIDTH, num_classes, 1)
        )

    def forward(self, stack: Tensor, decoded: Tensor | None = None) -> Tensor:
        """Probabilities [B, K, *spatial] that sum to 1 over K.

        Args:
          stack: [B, M, C, *spatial], zero where a modality is missing.
          decoded: [B, C, *spatial] if guided.
        """
        embedded = self.embed(stack.flatten(1, 2))
        joined = embedded if decoded is None else torch.cat((decoded, embedded), dim=1)
        return self.classify(joined).softmax(dim=1)


class RegionFusion(nn.Module):
    """One map from the features of all modalities: half from class regions, half from the plain stack.

    In the region of class k, features are Σ_m gate_km X_m p_k. The gates of a class come from each modality's mean
    within the region and from the region's size.

    Args:
      modalities: M.
      width: C, channels of each modality's features and of the result.
      num_classes: K.
      padding_mode: See `block`.
    """

    def __init__(self, modalities: int, width: int, num_classes: int, *, padding_mode: PaddingMode) -> None:
        super().__init__()
        self.gates = nn.ModuleList(_gate(modalities, width) for _ in range(num_classes))
        self.regions = _narrowing(num_classes * width, width, padding_mode)
        self.shortcut = _narrowing(modalities * width, width, padding_mode)

    def forward(self, stack: Tensor, probabilities: Tensor) -> Tensor:
        """[B, C, *spatial] from [B, M, C, *spatial] and [B, K, *spatial], through which no gradient goes back."""
        probabilities = probabilities.detach()
        gates = self._gates(stack, probabilities).to(stack.dtype)
        gated = (gates @ stack.flatten(2)).view(*gates.shape[:2], *stack.shape[2:])
        regions = gated * probabilities[:, :, None].to(stack.dtype)
        return torch.cat((self.regions(regions.flatten(1, 2)), self.shortcut(stack.flatten(1, 2))), dim=1)

    def _gates(self, stack: Tensor, probabilities: Tensor) -> Tensor:
        """[B, K, M] in (0, 1): the same for all voxels, so that modalities are summed before regions are cut."""
        means, share = _region_means(stack, probabilities)
        described = torch.cat((means, share[..., None]), dim=2)[..., None, None, None]
        return torch.stack([gate(described[:, k]).flatten(1) for k, gate in enumerate(self.gates)], dim=1)


def _region_means(stack: Tensor, probabilities: Tensor) -> tuple[Tensor, Tensor]:
    """Mean features of each modality within each region, [B, K, M C], and each region's share of the volume, [B, K].

    At least in single precision, also under autocast: half has neither the range for sums over a volume nor the
    precision for shares of one.
    """
    precision = torch.promote_types(stack.dtype, torch.float32)
    with _without_autocast(stack.device):
        flat = probabilities.to(precision).flatten(2)
        share = flat.mean(dim=2) + _TINY
        total = flat @ stack.to(precision).flatten(1, 2).flatten(2).transpose(1, 2)
        return total / flat.shape[2] / share[:, :, None], share


def _without_autocast(device: torch.device) -> contextlib.AbstractContextManager:
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


def _gate(modalities: int, width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv3d(modalities * width + 1, _GATE_WIDTH, 1),
        nn.LeakyReLU(SLOPE, inplace=True),
        nn.Conv3d(_GATE_WIDTH, modalities, 1),
        nn.Sigmoid(),
    )


def _narrowing(inputs: int, width: int, padding_mode: PaddingMode) -> nn.Sequential:
    return nn.Sequential(
        block(inputs, width, kernel=1),
        block(width, width, padding_mode=padding_mode),
        block(width, width // 2, kernel=1),
    )
