"""FedMEPD's network: an encoder per MR sequence, region-aware fusion, and calibration by anchors of other sites.

Liu et al., Federated modality-specific encoders and partially personalized fusion decoder, Medical Image Analysis,
2025, https://arxiv.org/abs/2603.04887, on the backbone of RFNet (ICCV 2021); behind the interface nnU-Net asks of its
networks.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedcmt.models.calibration import Calibration
from fedcmt.models.region_fusion import PaddingMode, ProbabilityMap, RegionFusion, block
from fedcmt.models.sequences import SEQUENCES, canonical

WIDTHS = (16, 32, 64, 128)
"""Feature maps per level, from full resolution down."""

HEADS = (4, 8, 8, 8)
"""Attention heads per level, from full resolution down."""

CalibrationMode = Literal["replace", "add"]
_ATTENTION_SCALE = 0.001


class Outputs(NamedTuple):
    """Everything that the loss and the anchors need; the first item is the prediction, as nnU-Net's trainer expects.

    Attributes:
      logits: Of the fused prediction, [B, K, *spatial].
      probability_maps: Those of each level that the fusion follows, at full resolution, from level 1 down,
        [B, K, *spatial].
      auxiliary: Sequence to logits [B, K, *spatial] of the auxiliary decoder from that sequence alone.
      features: F_1, F_2, ...: fused features of each level before calibration, [B, C_l, *spatial / 2^(l-1)].
    """

    logits: Tensor
    probability_maps: tuple[Tensor, ...]
    auxiliary: dict[str, Tensor]
    features: tuple[Tensor, ...]


class FedMEPDNet(nn.Module):
    """One encoder for each sequence that a site has; the decoder sees a stack of all sequences, zero where one lacks.

    What comes out is logits, so that nnU-Net's softmax makes P of them: in evaluation, and in training too unless
    ``all_outputs`` is set; then training mode gives `Outputs`. The order of a site's channels does not matter.

    Parameters are ``encoders.SEQUENCE.`` of a site's own sequences, ``decoder.`` (the fusion decoder, convolutions
    alone), ``auxiliary.`` (a decoder without fusion, which all encoders share, for the loss), and of a calibrated
    network ``calibration.LEVEL.`` and ``anchors.LEVEL``. Anchors are parameters without gradient, zero until they are
    set, so that checkpoints hold them. Levels count from 1 at full resolution. Plans name this class in
    ``network_class_name``, so nnU-Net builds it wherever this package is importable.

    Args:
      input_channels: Channels of the input.
      num_classes: K, labels with background, which exclude each other.
      sequences: What each channel is, under any name that `canonical` knows.
      n_stages: Levels, at least 2; every axis is halved between two of them, odd lengths upwards.
      features_per_stage: Feature maps of each level, multiples of 4.
      deep_supervision: nnU-Net's switch for outputs of falling resolution; there are none, so it must be off.
      calibrated: Whether fused features go through `Calibration` at every level.
      calibration: Whether calibrated features "replace" the fused ones or "add" to them; the latter starts near the
        network without calibration.
      anchors_per_class: Anchors of each class and level.
      heads: Attention heads of each level.
      attention_dropout: In [0, 1).
      padding_mode: What convolutions are padded with: "zeros", as released, or "reflect", as in RFNet.

    Attributes:
      all_outputs: Whether training mode gives `Outputs`; whoever trains with FedMEPD's loss sets it. Evaluation mode
        gives logits always, so nnU-Net may validate and predict without a word to the network.

    Raises:
      ValueError: If an argument is out of range, two disagree, or a sequence is unknown or there twice.
    """

    keys_to_in_proj = ()
    """No convolution has one input channel per channel of the image: each encoder has one."""

    all_outputs: bool = False

    def __init__(
        self,
        input_channels: int,
        num_classes: int,
        sequences: Sequence[str],
        n_stages: int = len(WIDTHS),
        features_per_stage: Sequence[int] = WIDTHS,
        deep_supervision: bool = False,
        calibrated: bool = False,
        calibration: CalibrationMode = "replace",
        anchors_per_class: int = 4,
        heads: Sequence[int] = HEADS,
        attention_dropout: float = 0.1,
        padding_mode: PaddingMode = "zeros",
    ) -> None:
        super().__init__()
        _check_one_output(num_classes, deep_supervision)
        _check_levels(n_stages, features_per_stage, padding_mode)
        _check_calibration(n_stages, calibration, anchors_per_class, heads, attention_dropout)
        self._channels = _channels(sequences, input_channels)
        self._used = tuple(self._channels)
        widths, names = tuple(features_per_stage), [str(level + 1) for level in range(n_stages)]
        self.encoders = nn.ModuleDict({sequence: _Encoder(widths, padding_mode) for sequence in self._channels})
        self.decoder = _FusionDecoder(widths, num_classes, padding_mode)
        self.auxiliary = _AuxiliaryDecoder(widths, num_classes, padding_mode)
        self.calibration, self.anchors = nn.ModuleDict(), nn.ParameterDict()
        if calibrated:
            for level, width, count in zip(names, widths, heads, strict=True):
                self.calibration[level] = Calibration(width, count, attention_dropout)
                rows = torch.zeros(anchors_per_class * num_classes, width)
                self.anchors[level] = nn.Parameter(rows, requires_grad=False)
        self._adds = calibration == "add"
        self._halvings = n_stages - 1
        self._least = 2 if padding_mode == "reflect" else 1

    def forward(self, image: Tensor) -> Tensor | Outputs:
        """Logits [B, num_classes, *spatial] of images [B, input_channels, *spatial]; `Outputs` where the class says so.

        Raises:
          ValueError: If the channels are another number, or the lowest level would be too small to normalise or pad.
        """
        if self.training and self.all_outputs:
            return self.outputs(image)
        return self._fuse(self._encode(image))[0]

    def outputs(self, image: Tensor) -> Outputs:
        """Everything about images [B, input_channels, *spatial], in training and in evaluation mode.

        Raises:
          ValueError: As `forward` does.
        """
        encoded = self._encode(image)
        logits, maps, features = self._fuse(encoded)
        size = image.shape[2:]
        return Outputs(
            logits,
            tuple(_cropped(_enlarged(own, 2**level), size) for level, own in enumerate(maps)),
            {sequence: self.auxiliary(own) for sequence, own in encoded.items()},
            tuple(features),
        )

    @contextlib.contextmanager
    def only(self, sequences: Sequence[str]) -> Iterator[None]:
        """Go by some of the site's sequences while in here: the others count as missing, whatever their channels hold.

        Args:
          sequences: Names that `canonical` knows.

        Raises:
          ValueError: If there is none, or one that the site lacks.
        """
        chosen, before = canonical(sequences), self._used
        lacking = sorted(set(chosen) - set(self._channels))
        if lacking or not chosen:
            raise ValueError(
                f"FedMEPDNet: only {list(sequences)}, expected one or more of the site's {list(self._channels)}."
            )
        self._used = tuple(sequence for sequence in self._channels if sequence in chosen)
        try:
            yield
        finally:
            self._used = before

    @staticmethod
    def initialize(module: nn.Module) -> None:
        """He's normal distribution for weights of convolutions, N(0, 0.001²) for those of attention, its biases zero.

        nnU-Net calls it on every submodule. Biases of convolutions stay as torch draws them.
        """
        if isinstance(module, nn.Conv3d):
            nn.init.kaiming_normal_(module.weight)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=_ATTENTION_SCALE)
            nn.init.zeros_(module.bias)

    def _encode(self, image: Tensor) -> dict[str, list[Tensor]]:
        """Features of each sequence in use, by level."""
        self._check_image(tuple(image.shape))
        return {sequence: self.encoders[sequence](image[:, self._channels[sequence], None]) for sequence in self._used}

    def _fuse(self, encoded: Mapping[str, Sequence[Tensor]]) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        levels = zip(*encoded.values(), strict=True)
        return self.decoder([_stack(dict(zip(encoded, level, strict=True))) for level in levels], self._calibrate)

    def _calibrate(self, level: str, features: Tensor) -> Tensor:
        if level not in self.calibration:
            return features
        calibrated = self.calibration[level](features, self.anchors[level])
        return features + calibrated if self._adds else calibrated

    def _check_image(self, size: tuple[int, ...]) -> None:
        if len(size) != 5 or size[1] != len(self._channels):
            raise ValueError(
                f"FedMEPDNet: input {size}, expected [B, {len(self._channels)}, Z, Y, X], one channel for each of "
                f"{list(self._channels)} in three dimensions."
            )
        lowest = [-(-length // 2**self._halvings) for length in size[2:]]
        if max(lowest) == 1 or min(lowest) < self._least:
            raise ValueError(
                f"FedMEPDNet: patch {size[2:]} is {tuple(lowest)} voxels at the lowest level, too few to normalise or "
                f"to pad. Take a patch of more than {2**self._halvings} voxels on every axis."
            )


class _Encoder(nn.Module):
    """Features of one sequence at every level, from full resolution down."""

    def __init__(self, widths: Sequence[int], padding_mode: PaddingMode) -> None:
        super().__init__()
        self.first = nn.ModuleList(
            block(above, width, stride=1 if above == 1 else 2, padding_mode=padding_mode)
            for above, width in pairwise((1, *widths))
        )
        self.residual = nn.ModuleList(
            nn.Sequential(*(block(width, width, padding_mode=padding_mode) for _ in range(2))) for width in widths
        )

    def forward(self, image: Tensor) -> list[Tensor]:
        maps = [image]
        for first, residual in zip(self.first, self.residual, strict=True):
            start = first(maps[-1])
            maps.append(start + residual(start))
        return maps[1:]


class _UpwardPath(nn.Module):
    """Steps from the lowest level to full resolution, and a 1x1x1 convolution to logits there."""

    def __init__(self, widths: Sequence[int], num_classes: int, padding_mode: PaddingMode) -> None:
        super().__init__()
        self.ups, self.merges = nn.ModuleDict(), nn.ModuleDict()
        for level, (width, below) in enumerate(pairwise(widths), start=1):
            self.ups[str(level)] = block(below, width, padding_mode=padding_mode)
            self.merges[str(level)] = nn.Sequential(
                block(2 * width, width, padding_mode=padding_mode), block(width, width, kernel=1)
            )
        self.head = nn.Conv3d(widths[0], num_classes, kernel_size=1)

    def _up(self, level: str, lower: Tensor, size: Sequence[int]) -> Tensor:
        return _cropped(self.ups[level](_enlarged(lower, 2)), size)

    def _merge(self, level: str, own: Tensor, upper: Tensor) -> Tensor:
        return self.merges[level](torch.cat((own, upper), dim=1))


class _FusionDecoder(_UpwardPath):
    """The decoder that sites share in part: fusion of all sequences at every level."""

    deep_supervision: bool = False
    """nnU-Net writes here; nothing reads it."""

    def __init__(self, widths: Sequence[int], num_classes: int, padding_mode: PaddingMode) -> None:
        super().__init__(widths, num_classes, padding_mode)
        self.maps, self.fusions = nn.ModuleDict(), nn.ModuleDict()
        for level, width in enumerate(widths, start=1):
            sizes = (len(SEQUENCES), width, num_classes)
            self.maps[str(level)] = ProbabilityMap(*sizes, guided=level < len(widths), padding_mode=padding_mode)
            self.fusions[str(level)] = RegionFusion(*sizes, padding_mode=padding_mode)

    def forward(
        self, stacks: Sequence[Tensor], calibrate: Callable[[str, Tensor], Tensor]
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Logits, and by level probability maps and fused features, each at its level's resolution.

        Args:
          stacks: [B, M, C, *spatial] of each level.
          calibrate: (level, fused features) -> features that go up.
        """
        maps: list[Tensor] = []
        features: list[Tensor] = []
        rising: Tensor | None = None
        for number, stack in reversed(list(enumerate(stacks, start=1))):
            level = str(number)
            decoded = None if rising is None else self._up(level, rising, stack.shape[3:])
            maps.insert(0, self.maps[level](stack, decoded))
            fused = self.fusions[level](stack, maps[0])
            features.insert(0, fused if decoded is None else self._merge(level, fused, decoded))
            rising = calibrate(level, features[0])
        return self.head(rising), maps, features


class _AuxiliaryDecoder(_UpwardPath):
    """A plain U-Net decoder over the features of one sequence."""

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        result = features[-1]
        for number, skip in reversed(list(enumerate(features[:-1], start=1))):
            level = str(number)
            result = self._merge(level, skip, self._up(level, result, skip.shape[2:]))
        return self.head(result)


def _stack(features: Mapping[str, Tensor]) -> Tensor:
    """[B, M, C, *spatial] in the canonical order, zero for sequences without features."""
    missing = torch.zeros_like(next(iter(features.values())))
    return torch.stack([features.get(sequence, missing) for sequence in SEQUENCES], dim=1)


def _enlarged(maps: Tensor, factor: int) -> Tensor:
    if factor == 1:
        return maps
    return functional.interpolate(maps, scale_factor=factor, mode="trilinear", align_corners=True)


def _cropped(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Without what an odd length has become too long by, at the end of each axis."""
    return maps[..., : size[0], : size[1], : size[2]]


def _channels(sequences: Sequence[str], input_channels: int) -> dict[str, int]:
    """Sequence to the channel that holds it, in the canonical order."""
    if len(sequences) != input_channels or not sequences:
        raise ValueError(
            f"FedMEPDNet: {input_channels} input channels and sequences {list(sequences)}, expected one name for each. "
            "Plan again."
        )
    found = canonical(sequences)
    return {sequence: found.index(sequence) for sequence in SEQUENCES if sequence in found}


def _check_one_output(num_classes: int, deep_supervision: bool) -> None:
    if num_classes < 2:
        raise ValueError(f"FedMEPDNet: {num_classes} classes, expected at least background and one label.")
    if deep_supervision:
        raise ValueError(
            "FedMEPDNet: deep_supervision is true, but all outputs are at full resolution. Train it with a trainer "
            "that switches it off, such as nnUNetTrainerNoDeepSupervision."
        )


def _check_levels(n_stages: int, widths: Sequence[int], padding_mode: str) -> None:
    if n_stages < 2 or len(widths) != n_stages or any(width < 4 or width % 4 for width in widths):
        raise ValueError(
            f"FedMEPDNet: n_stages is {n_stages} and features_per_stage {list(widths)}, expected at least 2 stages and "
            "a multiple of 4 for each. Plan again."
        )
    if padding_mode not in get_args(PaddingMode):
        raise ValueError(f"FedMEPDNet: padding_mode is {padding_mode!r}, expected one of {get_args(PaddingMode)}.")


def _check_calibration(n_stages: int, mode: str, anchors: int, heads: Sequence[int], dropout: float) -> None:
    if mode not in get_args(CalibrationMode):
        raise ValueError(f"FedMEPDNet: calibration is {mode!r}, expected one of {get_args(CalibrationMode)}.")
    if anchors < 1:
        raise ValueError(f"FedMEPDNet: anchors_per_class is {anchors}, expected at least 1.")
    if len(heads) != n_stages or any(count < 1 for count in heads):
        raise ValueError(f"FedMEPDNet: heads are {list(heads)}, expected at least 1 for each of {n_stages} stages.")
    if not 0 <= dropout < 1:
        raise ValueError(f"FedMEPDNet: attention_dropout is {dropout}, expected a number in [0, 1).")
