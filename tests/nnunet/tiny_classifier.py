"""The tiny network with an output map per class. Two of the classes are called what nnU-Net gives a meaning."""

from pathlib import Path

import torch
from torch import Tensor

from fedcmt.nnunet.export import classifier_dataset_json, export_model_folder, stock_network
from tests.nnunet.tiny_model import CONFIGURATION, DATASET_JSON, tiny_plans

CLASSES = ("tumour", "background", "cyst", "ignore")


def classifier_parameters(seed: int) -> dict[str, Tensor]:
    """Parameters that make no class certain."""
    generator = torch.Generator().manual_seed(seed)
    network = stock_network(tiny_plans(), classifier_dataset_json(DATASET_JSON, CLASSES), CONFIGURATION)
    return {n: 0.3 * torch.randn(p.shape, generator=generator) for n, p in network.named_parameters()}


def constant_parameters(logits: tuple[float, ...]) -> dict[str, Tensor]:
    """Parameters whose maps hold these logits in every voxel."""
    head = "decoder.seg_layers.1."
    parameters = classifier_parameters(0)
    return parameters | {head + "weight": 0 * parameters[head + "weight"], head + "bias": torch.tensor(logits)}


def export_tiny_classifier(folder: Path, parameters: dict[str, Tensor]) -> Path:
    """A model folder with these parameters as its final checkpoint."""
    return export_model_folder(
        folder,
        plans=tiny_plans(),
        dataset_json=DATASET_JSON,
        configuration=CONFIGURATION,
        mirroring_axes=(0, 1, 2),
        checkpoints={"final": parameters},
        classes=CLASSES,
    )
