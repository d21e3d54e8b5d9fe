"""Small real networks, a tiny data set and a small job folder, for all tests."""

import json
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from torch import nn

from fedcmt.data.phantoms import make_brain_mr
from tests.tiny import DATASET

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell starts what it runs in the background so, and every process that a test interrupts would inherit it.
    signal.signal(signal.SIGINT, signal.default_int_handler)

FIRST_CONVOLUTION = {"plain": "encoder.stages.0.0.convs.0.conv.weight", "residual": "encoder.stem.convs.0.conv.weight"}


@pytest.fixture(scope="session")
def unet() -> Callable[..., nn.Module]:
    """nnU-Net's own networks with three stages, four features and two convolutions in the first stage."""

    def build(kind: str = "plain", channels: int = 2, seed: int = 0) -> nn.Module:
        shape = {
            "input_channels": channels,
            "n_stages": 3,
            "features_per_stage": [4, 5, 6],
            "conv_op": nn.Conv3d,
            "kernel_sizes": 3,
            "strides": [1, 2, 2],
            "num_classes": 3,
            "n_conv_per_stage_decoder": 1,
            "conv_bias": True,
            "norm_op": nn.InstanceNorm3d,
            "norm_op_kwargs": {"affine": True},
            "nonlin": nn.LeakyReLU,
            "deep_supervision": False,
        }
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            if kind == "plain":
                return PlainConvUNet(n_conv_per_stage=[2, 1, 1], **shape)
            return ResidualEncoderUNet(n_blocks_per_stage=1, **shape)

    return build


@pytest.fixture(scope="session")
def first_convolution() -> dict[str, str]:
    """Kind of network to the name of the weight that faces the input."""
    return FIRST_CONVOLUTION


@pytest.fixture
def job_folder(tmp_path: Path) -> Path:
    """A job of two sites, `north` and `south`, as the launcher finds it under ``jobs/``."""
    folder = tmp_path / "jobs" / "tiny"
    algorithm = {"path": "fedcmt.algorithms.fedavg.FedAvg", "args": {}}
    workflow = {"id": "rounds", "path": "fedcmt.flare.server.FederatedRounds", "args": {"num_rounds": 3, "seed": 5}}
    files = {
        "meta.json": {
            "name": "tiny",
            "deploy_map": {"server": ["server"], "north": ["north"], "south_app": ["south"]},
        },
        "demo.json": {"about": "generated", "cohort": {}, "set": {"server.num_rounds": 2}},
        "server/config/config_fed_server.json": {
            "workflows": [workflow],
            "components": [{"id": "tensorboard", "path": "x.Y"}, {"id": "aggregator", **algorithm}],
        },
    }
    for app, dataset_id in (("north", 11), ("south_app", 12)):
        files[f"{app}/config/config_fed_client.json"] = {"components": [{"id": "algorithm", **algorithm}]}
        files[f"{app}/config/site.json"] = {"dataset_id": dataset_id, "modality": "MR", "optimizer": {"lr": 0.25}}
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))
    return folder


@pytest.fixture(scope="module")
def tiny_raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ``nnUNet_raw`` with the data set of `tests.tiny`; to be copied by a test that changes it."""
    folder = tmp_path_factory.mktemp("tiny") / "raw"
    make_brain_mr(
        folder / DATASET,
        num_train=5,
        num_test=1,
        seed=3,
        style="site_a",
        channels=("FLAIR", "T2"),
        shape_vox=(24, 28, 20),
    )
    return folder


@pytest.fixture
def tiny_folders(tiny_raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """nnU-Net's folders in the environment, as the launcher sets them; returns a folder for what a test keeps."""
    monkeypatch.setenv("nnUNet_raw", str(tiny_raw))
    monkeypatch.setenv("nnUNet_preprocessed", str(tiny_raw.parent / "preprocessed"))
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "results"))
    return tmp_path
