"""A three-stage nnU-Net with four features, and a data set of four channels, regions and a skewed grid for it."""

from pathlib import Path

import numpy as np
import SimpleITK as sitk
import torch
from torch import Tensor

from fedcmt.nnunet.export import export_model_folder, stock_network

CONFIGURATION = "3d_fullres"
DATASET_JSON = {
    "channel_names": {"0": "T1", "1": "T1ce", "2": "T2", "3": "FLAIR"},
    "labels": {"background": 0, "WT": [1, 2, 3], "TC": [2, 3], "ET": 3},
    "regions_class_order": [1, 2, 3],
    "numTraining": 2,
    "file_ending": ".nii.gz",
}
# A rotation by 0.3 rad about z, with two axes swapped and one flipped.
DIRECTION = (np.cos(0.3), 0.0, -np.sin(0.3), np.sin(0.3), 0.0, np.cos(0.3), 0.0, -1.0, 0.0)
SPACING, ORIGIN, SHAPE = (0.8, 1.1, 2.0), (-30.5, 12.25, 101.0), (13, 22, 19)  # (x, y, z) mm; shape (z, y, x)


def tiny_plans() -> dict:
    """Plans of a PlainConvUNet for patches of 16^3, with axes transposed as nnU-Net does for thick slices."""
    resampling = "resample_data_or_seg_to_shape"
    data = {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None}
    stages = 3
    return {
        "dataset_name": "Dataset901_Tiny",
        "plans_name": "nnUNetPlans",
        "original_median_spacing_after_transp": [1.0, 1.9, 0.9],
        "original_median_shape_after_transp": [16, 16, 16],
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": [2, 0, 1],
        "transpose_backward": [1, 2, 0],
        "experiment_planner_used": "ExperimentPlanner",
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {str(c): {"mean": 0.0, "std": 1.0} for c in range(4)},
        "configurations": {
            CONFIGURATION: {
                "data_identifier": "nnUNetPlans_3d_fullres",
                "preprocessor_name": "DefaultPreprocessor",
                "batch_size": 2,
                "patch_size": [16, 16, 16],
                "median_image_size_in_voxels": [16, 16, 16],
                "spacing": [1.0, 1.9, 0.9],
                "normalization_schemes": ["ZScoreNormalization"] * 4,
                "use_mask_for_norm": [False] * 4,
                "resampling_fn_data": resampling,
                "resampling_fn_seg": resampling,
                "resampling_fn_probabilities": resampling,
                "resampling_fn_data_kwargs": data,
                "resampling_fn_seg_kwargs": {**data, "is_seg": True, "order": 1},
                "resampling_fn_probabilities_kwargs": {**data, "order": 1},
                "batch_dice": False,
                "architecture": {
                    "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
                    "arch_kwargs": {
                        "n_stages": stages,
                        "features_per_stage": [4, 4, 4],
                        "conv_op": "torch.nn.modules.conv.Conv3d",
                        "kernel_sizes": [[3, 3, 3]] * stages,
                        "strides": [[1, 1, 1], [2, 2, 2], [2, 2, 2]],
                        "n_conv_per_stage": [1] * stages,
                        "n_conv_per_stage_decoder": [1] * (stages - 1),
                        "conv_bias": True,
                        "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
                        "norm_op_kwargs": {"eps": 1e-05, "affine": True},
                        "dropout_op": None,
                        "dropout_op_kwargs": None,
                        "nonlin": "torch.nn.LeakyReLU",
                        "nonlin_kwargs": {"inplace": True},
                    },
                    "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
                },
            }
        },
    }


def random_parameters(seed: int) -> dict[str, Tensor]:
    """Parameters of the tiny network that give label maps with all labels in them."""
    generator = torch.Generator().manual_seed(seed)
    network = stock_network(tiny_plans(), DATASET_JSON, CONFIGURATION)
    drawn = {n: 0.4 * torch.randn(p.shape, generator=generator) for n, p in network.named_parameters()}
    heads = [n for n in drawn if "seg_layers" in n and n.endswith("bias")]
    return drawn | {n: torch.zeros_like(drawn[n]) for n in heads}  # else one label wins everywhere


def export_tiny(
    folder: Path, parameters: dict[str, Tensor], mirroring_axes: tuple[int, ...] | None = (0, 1, 2)
) -> Path:
    """A model folder with these parameters as its final checkpoint."""
    return export_model_folder(
        folder,
        plans=tiny_plans(),
        dataset_json=DATASET_JSON,
        configuration=CONFIGURATION,
        mirroring_axes=mirroring_axes,
        checkpoints={"final": parameters},
    )


def as_image(array: np.ndarray) -> sitk.Image:
    """The array (z, y, x) on the awkward grid."""
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(SPACING)
    image.SetOrigin(ORIGIN)
    image.SetDirection(DIRECTION)
    return image


def write_images(folder: Path, cases: tuple[str, ...] = ("a_01", "b_02")) -> Path:
    """Smooth random images of four channels per case."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(7)
    for case in cases:
        for channel in range(4):
            image = sitk.SmoothingRecursiveGaussian(as_image(rng.normal(size=SHAPE).astype(np.float32)), 1.5)
            sitk.WriteImage(image, str(folder / f"{case}_{channel:04d}.nii.gz"))
    return folder
