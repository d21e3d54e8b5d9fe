"""Tiny models of the networks that can do without some sequences, for the data set of `tiny_model`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedcmt.nnunet.export import export_model_folder, stock_network
from fedcmt.params import snapshot
from tests.nnunet.tiny_model import CONFIGURATION, DATASET_JSON, tiny_plans

LABELS = {"background": 0, "oedema": 1, "core": 2}
SEQUENCES = ("T1", "T1ce", "T2", "FLAIR")
"""The channels of `tiny_model`, whose order is not the canonical one."""

_FEDMEPD: dict[str, Any] = {"n_stages": 2, "features_per_stage": [4, 4], "heads": [1, 2], "deep_supervision": False}
_MUNET: dict[str, Any] = {
    "n_stages": 2,
    "stem_features": 2,
    "features_per_stage": [2, 4],
    "dimensions": 3,
    "strides": [[1, 1, 1], [2, 2, 2], [2, 2, 2]],
}


def sequence_dataset(sequences: Sequence[str] = SEQUENCES) -> dict:
    """A dataset.json of these channels and of labels that exclude each other."""
    kept = {key: DATASET_JSON[key] for key in ("numTraining", "file_ending")}
    return {**kept, "channel_names": {str(i): name for i, name in enumerate(sequences)}, "labels": LABELS}


def sequence_plans(network: str, sequences: Sequence[str] = SEQUENCES) -> dict:
    """Plans of "FedMEPDNet" or "MUNet" with masked normalisation, as nnU-Net plans for brains."""
    fedmepd = network == "FedMEPDNet"
    plans = tiny_plans()
    plans["configurations"][CONFIGURATION] |= {
        "architecture": {
            "network_class_name": f"fedcmt.models.{'fedmepd' if fedmepd else 'munet'}.{network}",
            "arch_kwargs": {**_FEDMEPD, "sequences": list(sequences)} if fedmepd else _MUNET,
            "_kw_requires_import": [],
        },
        "normalization_schemes": ["ZScoreNormalization"] * len(sequences),
        "use_mask_for_norm": [True] * len(sequences),
    }
    return plans


def sequence_parameters(network: str, sequences: Sequence[str] = SEQUENCES) -> dict[str, Tensor]:
    """Parameters that give label maps with all labels in them."""
    generator = torch.Generator().manual_seed(4)
    own = snapshot(stock_network(sequence_plans(network, sequences), sequence_dataset(sequences), CONFIGURATION))
    drawn = {name: 0.5 * torch.randn(t.shape, generator=generator) for name, t in own.items()}
    heads = [n for n in drawn if n in ("decoder.head.bias", "decoder.seg_layers.1.bias")]
    return drawn | {name: torch.zeros_like(drawn[name]) for name in heads}  # else one label wins everywhere


def export_sequences(
    folder: Path, network: str, parameters: dict[str, Tensor], sequences: Sequence[str] = SEQUENCES
) -> Path:
    """A model folder without mirroring."""
    return export_model_folder(
        folder,
        plans=sequence_plans(network, sequences),
        dataset_json=sequence_dataset(sequences),
        configuration=CONFIGURATION,
        mirroring_axes=None,
        checkpoints={"final": parameters},
    )
