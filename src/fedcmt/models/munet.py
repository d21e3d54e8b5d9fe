"""M-Unet: an encoder per modality, a cross-modality module per scale, one decoder with deep supervision.

After Fed-MUnet, 2024, https://arxiv.org/abs/2409.01020, as its authors released it for axial slices; in three
dimensions here too, and behind the interface nnU-Net asks of its networks.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from fedcmt.models.conv_block import CONVOLUTIONS, NORMS, SLOPE, TRANSPOSED, conv_block
from fedcmt.models.cross_modality import CMM_NORMS, CrossModality

STEM_WIDTH = 16
"""Feature maps at full resolution."""

WIDTHS = (32, 64, 128, 256, 512)
"""Feature maps per stage, from half resolution down."""


class MUNet(nn.Module):
    """One encoder per input channel; after every stage their maps are fused, and the decoder sees only fused maps.

    A channel that is zero everywhere in a patch is a sequence that this case lacks: its maps are zero wherever they are
    fused, so its encoder has no part in the result and gets no gradient. That is decided for each case of a batch by
    itself; batch norm alone still sees such maps.

    Parameters are ``encoder.stems.M.``, ``encoder.stages.M.K.``, ``encoder.fusions.K.``, ``decoder.transpconvs.I.``,
    ``decoder.stages.I.`` and ``decoder.seg_layers.I.``, with K counted from half resolution down and I from the lowest
    map up, as nnU-Net counts. The last decoder step has neither skip nor stage. Plans name this class in
    ``network_class_name``, so nnU-Net builds it wherever this package is importable.

    Args:
      input_channels: Channels of the input, one modality each.
      num_classes: Output maps: labels with background, or regions.
      n_stages: Encoder stages; each halves every axis, so there is one resolution more than in `UNet3D` of as many.
      stem_features: Feature maps of a modality at full resolution, and channels of an attention head.
      features_per_stage: Feature maps of a modality after each stage, multiples of ``stem_features``.
      deep_supervision: Whether there is an output at every decoder scale; ``decoder.deep_supervision`` switches it.
      dimensions: 2 or 3.
      strides: What nnU-Net's trainer reads in plans to scale its targets: 1, then 2 for each stage, per axis. None
        for that.
      norm: "instance", "group" or "batch". Batch norm, the paper's, has running statistics, which a federation of
        parameters cannot average: `fedcmt.params` refuses such networks. It is for comparisons outside of one.
      cmm_norm: "none" or "pre_ln", see `CrossModality`.
      strict_compat: Create the last decoder stage too, which the released code has and never uses.

    Raises:
      ValueError: If one of these is out of range or they disagree.
    """

    keys_to_in_proj = ()
    """No convolution has one input channel per channel of the image: each stem has one."""

    prefixes_by_channel = ("encoder.stems.", "encoder.stages.")
    """Beginnings of the names of parameters that belong to a channel of the image by its number."""

    def __init__(
        self,
        input_channels: int,
        num_classes: int,
        n_stages: int = len(WIDTHS),
        stem_features: int = STEM_WIDTH,
        features_per_stage: Sequence[int] = WIDTHS,
        deep_supervision: bool = True,
        dimensions: int = 2,
        strides: Sequence[Sequence[int]] | None = None,
        norm: str = "instance",
        cmm_norm: str = "none",
        strict_compat: bool = False,
    ) -> None:
        super().__init__()
        _check_choice("dimensions", dimensions, tuple(CONVOLUTIONS))
        _check_choice("norm", norm, NORMS)
        _check_choice("cmm_norm", cmm_norm, CMM_NORMS)
        _check_widths(n_stages, stem_features, features_per_stage)
        _check_strides(strides, n_stages, dimensions)
        widths = (stem_features, *features_per_stage)
        self.encoder = _Encoder(input_channels, widths, dimensions, norm, cmm_norm)
        self.decoder = _Decoder(num_classes, widths, dimensions, norm, strict_compat)
        self.decoder.deep_supervision = deep_supervision
        self._divisor = 2**n_stages

    def forward(self, image: Tensor) -> Tensor | list[Tensor]:
        """Logits of images [B, input_channels, *spatial].

        Returns:
          [B, num_classes, *spatial], or under deep supervision a list of ``n_stages`` of them from full resolution
          down, each half as long on every axis as the one before.

        Raises:
          ValueError: If an axis is not a multiple of 2^n_stages voxels.
        """
        size = tuple(image.shape[2:])
        if any(length % self._divisor for length in size):
            raise ValueError(
                f"MUNet: patch {size}, expected multiples of {self._divisor} voxels, as every axis is halved that "
                "often. Plan for this network, or change patch_size in the plans."
            )
        return self.decoder(self.encoder(image))

    @staticmethod
    def initialize(module: nn.Module) -> None:
        """He's normal distribution for a leaky ReLU, and biases of zero; nnU-Net calls it on every submodule."""
        if isinstance(module, nn.Conv2d | nn.Conv3d | nn.ConvTranspose2d | nn.ConvTranspose3d):
            nn.init.kaiming_normal_(module.weight, a=SLOPE)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


class _Encoder(nn.Module):
    """The fused map of every stage, from half resolution down. Modalities meet nowhere else."""

    def __init__(self, modalities: int, widths: Sequence[int], dimensions: int, norm: str, cmm_norm: str) -> None:
        super().__init__()
        self.stems = nn.ModuleList(conv_block(dimensions, 1, widths[0], stride=1, norm=norm) for _ in range(modalities))
        self.stages = nn.ModuleList(
            nn.ModuleList(
                conv_block(dimensions, above, width, stride=2, norm=norm) for above, width in pairwise(widths)
            )
            for _ in range(modalities)
        )
        self.fusions = nn.ModuleList(
            CrossModality(modalities, width, width // widths[0], dimensions=dimensions, norm=norm, cmm_norm=cmm_norm)
            for width in widths[1:]
        )

    def forward(self, image: Tensor) -> list[Tensor]:
        present = (image != 0).flatten(2).any(dim=2)
        maps = [stem(channel) for stem, channel in zip(self.stems, image.split(1, dim=1), strict=True)]
        scales = zip(*(stages.children() for stages in self.stages), strict=True)
        fused = []
        for scale, fusion in zip(scales, self.fusions, strict=True):
            maps = [stage(own) for stage, own in zip(scale, maps, strict=True)]
            fused.append(fusion(_without_missing(maps, present)))
        return fused


def _without_missing(maps: Sequence[Tensor], present: Tensor) -> list[Tensor]:
    """The maps, zero for the cases that lack the modality; chosen and not multiplied, as 0 times NaN is NaN.

    Args:
      maps: Per modality [B, C, *spatial].
      present: [B, M], true where the case has the modality.
    """
    shape = (-1, *(1,) * (maps[0].dim() - 1))
    return [torch.where(present[:, m].view(shape), own, torch.zeros_like(own)) for m, own in enumerate(maps)]


class _Decoder(nn.Module):
    """From the fused maps back to full resolution, with a 1x1 convolution to logits at every scale."""

    deep_supervision: bool
    """nnU-Net writes here."""

    def __init__(
        self, num_classes: int, widths: Sequence[int], dimensions: int, norm: str, strict_compat: bool
    ) -> None:
        super().__init__()
        steps = list(pairwise(reversed(widths)))
        self.transpconvs = nn.ModuleList(
            TRANSPOSED[dimensions](below, width, kernel_size=2, stride=2) for below, width in steps
        )
        self.stages = nn.ModuleList(
            conv_block(dimensions, 2 * width, width, stride=1, norm=norm)
            for _, width in (steps if strict_compat else steps[:-1])
        )
        self.seg_layers = nn.ModuleList(
            CONVOLUTIONS[dimensions](width, num_classes, kernel_size=1) for _, width in steps
        )

    def forward(self, fused: Sequence[Tensor]) -> Tensor | list[Tensor]:
        maps = [fused[-1]]
        skips = fused[-2::-1]
        for scale, up in enumerate(self.transpconvs):
            result = up(maps[-1])
            if scale < len(skips):
                result = self.stages[scale](torch.cat((result, skips[scale]), dim=1))
            maps.append(result)
        if not self.deep_supervision:
            return self.seg_layers[-1](maps[-1])
        return [head(own) for head, own in zip(self.seg_layers, maps[1:], strict=True)][::-1]


def planned_strides(n_stages: int, dimensions: int) -> list[list[int]]:
    """Strides from full resolution down, as nnU-Net's plans hold them: 1, then 2 for each stage."""
    return [[1] * dimensions, *([2] * dimensions for _ in range(n_stages))]


def _check_choice(name: str, value: object, known: Sequence[object]) -> None:
    if value not in known:
        raise ValueError(f"MUNet: {name} is {value!r}, expected one of {list(known)}.")


def _check_widths(n_stages: int, stem: int, widths: Sequence[int]) -> None:
    if n_stages < 1 or len(widths) != n_stages:
        raise ValueError(
            f"MUNet: n_stages is {n_stages} and features_per_stage {list(widths)}, expected at least 1 stage and one "
            "number for each. Plan again."
        )
    if stem < 1 or any(width < stem or width % stem for width in widths):
        raise ValueError(
            f"MUNet: features_per_stage {list(widths)}, expected multiples of stem_features {stem}, the channels of an "
            "attention head. Plan with a max_features that base_features divides."
        )


def _check_strides(strides: Sequence[Sequence[int]] | None, n_stages: int, dimensions: int) -> None:
    expected = planned_strides(n_stages, dimensions)
    if strides is not None and [list(stride) for stride in strides] != expected:
        raise ValueError(
            f"MUNet: strides are {strides}, expected {expected} for {n_stages} stages in {dimensions} dimensions. "
            "Plan again."
        )
