"""The linear modality adapter: a 1x1x1 convolution in front of a PlainConvUNet, with the rank defect it has."""

from pathlib import Path
from typing import Any

import pytest
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from torch import Tensor, nn

from fedcmt.models.adapters import LinearAdapterUNet
from fedcmt.models.scopes import ADAPTER_ENCODER_DECODER, Partition, Scope
from fedcmt.nnunet.export import export_model_folder, stock_network
from fedcmt.nnunet.network import input_parameters
from fedcmt.params import copy_into, shapes, snapshot
from tests.nnunet.tiny_model import CONFIGURATION, DATASET_JSON, tiny_plans

FIRST = "encoder.stages.0.0.convs.0."
SLOTS = ["T1", "T1ce", "T2", "FLAIR"]
NETWORKS: dict[str, type[PlainConvUNet]] = {"linear": LinearAdapterUNet, "conv": PlainConvUNet}


def build(kind: str = "linear", channels: int = 4, seed: int = 0, **changes: Any) -> PlainConvUNet:
    """Two stages of six and eight features as nnU-Net initialises them."""
    options: dict[str, Any] = {
        "n_stages": 2,
        "features_per_stage": [6, 8],
        "conv_op": nn.Conv3d,
        "kernel_sizes": 3,
        "strides": [[1, 1, 1], [2, 2, 2]],
        "n_conv_per_stage": [3, 1],
        "n_conv_per_stage_decoder": [1],
        "num_classes": 3,
        "conv_bias": True,
        "norm_op": nn.InstanceNorm3d,
        "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "nonlin": nn.LeakyReLU,
        "nonlin_kwargs": {"inplace": True},
        "deep_supervision": False,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = NETWORKS[kind](channels, **(options | changes))
        network.apply(network.initialize)
    return network


def adapter(network: nn.Module) -> nn.Module:
    return network.get_submodule(FIRST.rstrip("."))


def image(channels: int, seed: int = 1) -> Tensor:
    return torch.randn(1, channels, 6, 8, 10, generator=torch.Generator().manual_seed(seed))


def singular_values(kind: str, channels: int) -> Tensor:
    """Of the matrix of output maps [features, voxels], relative to the largest."""
    with torch.no_grad():
        maps = adapter(build(kind, channels))(image(channels))[0].flatten(1)
    values = torch.linalg.svdvals(maps.double())
    return values / values[0]


def gradient(kind: str, channels: int) -> float:
    """Norm of the first convolution's gradient for a random direction of the block's output."""
    block = adapter(build(kind, channels))
    output = block(image(channels))
    (output * torch.randn(output.shape, generator=torch.Generator().manual_seed(2))).sum().backward()
    return float(block.get_parameter("conv.weight").grad.norm())  # type: ignore[union-attr]


def test_only_the_first_block_differs_from_nnunet_s_network() -> None:
    linear, conv = (shapes(snapshot(build(kind, channels=3))) for kind in ("linear", "conv"))
    norm = {f"{FIRST}norm.weight", f"{FIRST}norm.bias"}
    assert linear == {name: shape for name, shape in conv.items() if name not in norm} | {
        f"{FIRST}conv.weight": (6, 3, 1, 1, 1)
    }


@pytest.mark.parametrize(("channels", "parameters"), [(1, 64), (4, 160)])
def test_the_adapter_has_as_many_parameters_as_the_published_one(channels: int, parameters: int) -> None:
    network = build(channels=channels, features_per_stage=[32, 8])
    assert sum(p.numel() for p in adapter(network).parameters()) == parameters


def test_the_adapter_is_a_weighted_sum_of_channels_normalised_per_map() -> None:
    network, x = build(channels=2), image(2)
    with torch.no_grad():
        adapter(network).get_parameter("conv.weight")[0] = torch.tensor([3.0, -4.0]).reshape(2, 1, 1, 1)
        result = adapter(network)(x)[0, 0]
    mixed = 3 * x[0, 0] - 4 * x[0, 1]
    torch.testing.assert_close(result, (mixed - mixed.mean()) / mixed.std(correction=0), rtol=1e-4, atol=1e-5)
    assert result.min() < -1, "no nonlinearity"


def test_one_channel_makes_every_map_the_same_image_up_to_its_sign() -> None:
    block, x = adapter(build(channels=1)), image(1)
    weights = torch.tensor([2.0, -1.0, 0.5, -0.5, 1.0, -2.0])
    with torch.no_grad():
        block.get_parameter("conv.weight").copy_(weights.reshape(6, 1, 1, 1, 1))
        block.get_parameter("conv.bias").copy_(torch.arange(6.0))
        maps = block(x)[0]
    normalised = (x[0, 0] - x.mean()) / x.std(correction=0)
    for weight, result in zip(weights, maps, strict=True):
        torch.testing.assert_close(result, weight.sign() * normalised, rtol=1e-3, atol=1e-4)


def test_the_linear_adapter_has_rank_one_with_one_channel_and_the_default_one_more() -> None:
    assert (singular_values("linear", 1) > 1e-4).sum() == 1
    assert (singular_values("linear", 4) > 1e-4).sum() == 4
    assert (singular_values("conv", 1) > 0.05).sum() == 6


def test_the_linear_adapter_cannot_learn_from_one_channel_and_the_default_one_can() -> None:
    assert gradient("linear", 1) < 1e-2 * gradient("linear", 4)
    assert 0.1 < gradient("conv", 1) / gradient("conv", 4) < 10


def test_four_slots_are_one_convolution_bit_for_bit() -> None:
    source, target = build(seed=1), build(seed=2)
    split = Partition(
        ADAPTER_ENCODER_DECODER,
        shapes(snapshot(source)),
        modality="MR",
        channels=SLOTS,
        input_parameters=input_parameters(source),
    )
    group = {name for name, scope in split.scopes.items() if scope is Scope.GROUP}
    assert group == {f"{FIRST}conv.weight", f"{FIRST}conv.bias"}
    outgoing = split.outgoing(snapshot(source))
    assert {name: tuple(outgoing[name].shape) for name in outgoing if "@" in name} == {
        f"{FIRST}conv.bias@mr": (6,),
        **{f"{FIRST}conv.weight@mr.{slot}": (6, 1, 1, 1) for slot in ("t1", "t1ce", "t2", "flair")},
    }
    reference = nn.Conv3d(4, 6, 1)
    copy_into(reference, {name: snapshot(source)[f"{FIRST}conv.{name}"] for name in ("weight", "bias")})
    x = image(4)
    assert not torch.equal(adapter(target).get_submodule("conv")(x), reference(x))
    copy_into(target, split.incoming(outgoing))
    assert torch.equal(adapter(target).get_submodule("conv")(x), reference(x))


def test_deep_supervision_can_be_switched_as_nnunet_does() -> None:
    network = build(deep_supervision=True, n_stages=3, features_per_stage=[4, 5, 6], strides=[1, 2, 2],
                    n_conv_per_stage=2, n_conv_per_stage_decoder=1)  # fmt: skip
    x = torch.zeros(1, 4, 8, 12, 16)
    assert [tuple(o.shape[2:]) for o in network(x)] == [(8, 12, 16), (4, 6, 8)]
    network.decoder.deep_supervision = False
    assert network(x).shape == (1, 3, 8, 12, 16)


def test_planned_memory_is_that_of_nnunet_s_network() -> None:
    size = (8, 12, 16)
    assert build("linear").compute_conv_feature_map_size(size) == build("conv").compute_conv_feature_map_size(size)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"conv_op": nn.Conv2d, "norm_op": nn.InstanceNorm2d, "strides": [1, 2]}, "conv_op is Conv2d, expected Conv3d"),
        ({"n_conv_per_stage": [1, 2]}, r"n_conv_per_stage\[0\] is 1.*extra_stem_convolution"),
        ({"strides": [[1, 2, 1], [2, 2, 2]]}, r"strides\[0\] is \[1, 2, 1\]"),
    ],
)
def test_networks_it_cannot_be_part_of_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(**changes)


def test_nnunet_loads_the_exported_model(tmp_path: Path) -> None:
    plans = tiny_plans()
    architecture = plans["configurations"][CONFIGURATION]["architecture"]
    architecture["network_class_name"] = "fedcmt.models.adapters.LinearAdapterUNet"
    architecture["arch_kwargs"]["n_conv_per_stage"][0] = 2
    network = stock_network(plans, DATASET_JSON, CONFIGURATION)
    parameters = {name: torch.randn_like(tensor) for name, tensor in snapshot(network).items()}
    folder = export_model_folder(
        tmp_path / "model",
        plans=plans,
        dataset_json=DATASET_JSON,
        configuration=CONFIGURATION,
        mirroring_axes=None,
        checkpoints={"final": parameters},
    )
    predictor = nnUNetPredictor(device=torch.device("cpu"), verbose=False, allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(folder), use_folds=("all",))
    loaded = predictor.network
    assert type(loaded) is LinearAdapterUNet
    assert all(torch.equal(tensor, parameters[name]) for name, tensor in snapshot(loaded).items())
    copy_into(network, parameters)
    x = torch.randn(1, 4, 8, 12, 16)
    with torch.no_grad():
        assert torch.equal(loaded(x), network(x)[0])
