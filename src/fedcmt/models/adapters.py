"""nnU-Net's PlainConvUNet with the modality adapter of FedCMT's published code: a 1x1x1 convolution.

The default adapter is PlainConvUNet's own first block (3x3x3 convolution, affine instance norm, leaky ReLU). The one
here is for comparison with published results. With one input channel it cannot learn: instance norm takes bias and
magnitude away, so every output map is plus or minus the same normalised image and only the weights' signs count.
"""

from typing import Any

from dynamic_network_architectures.architectures.unet import PlainConvUNet
from dynamic_network_architectures.building_blocks.simple_conv_blocks import ConvDropoutNormReLU
from torch import nn


class LinearAdapterUNet(PlainConvUNet):
    """PlainConvUNet whose first block is Conv3d(C -> F, 1x1x1, bias), then InstanceNorm3d without affine parameters.

    F is the first stage's number of features. There is no nonlinearity in that block, and all blocks behind it are
    PlainConvUNet's. Its parameters are ``encoder.stages.0.0.convs.0.conv.weight`` (F, C, 1, 1, 1) and ``.bias`` (F,).
    Plans name this class in ``network_class_name``, so nnU-Net builds it wherever this package is importable.

    Args:
      arguments: PlainConvUNet's, in its order.
      options: PlainConvUNet's, by name.

    Raises:
      ValueError: If the network is not 3D, strides in its first stage, or has no block behind the adapter there.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        encoder = self.encoder
        blocks = encoder.stages[0][0].convs
        if encoder.conv_op is not nn.Conv3d:
            raise ValueError(
                f"{type(self).__name__}: conv_op is {encoder.conv_op.__name__}, expected Conv3d. Use PlainConvUNet for "
                "2d configurations."
            )
        if len(blocks) < 2:
            raise ValueError(
                f"{type(self).__name__}: n_conv_per_stage[0] is {len(blocks)}, expected at least 2: the first is the "
                "adapter, and the shared encoder starts behind it. Plan with extra_stem_convolution."
            )
        if any(step != 1 for step in encoder.strides[0]):
            raise ValueError(
                f"{type(self).__name__}: strides[0] is {list(encoder.strides[0])}, expected 1 on every axis: a strided "
                "1x1x1 convolution skips voxels."
            )
        blocks[0] = ConvDropoutNormReLU(
            nn.Conv3d,
            blocks[0].input_channels,
            blocks[0].output_channels,
            kernel_size=1,
            stride=1,
            conv_bias=True,
            norm_op=nn.InstanceNorm3d,
            norm_op_kwargs={"affine": False},
        )
