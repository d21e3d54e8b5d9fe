"""Plans without images: what nnU-Net would plan for the pooled data, or one topology for different data."""

import copy
import dataclasses
import json
import os
from collections.abc import Sequence
from multiprocessing.pool import ThreadPool
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from nnunetv2.experiment_planning.dataset_fingerprint import fingerprint_extractor
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from tiny_data import Geometry, geometries, pool, write_dataset

from fedcmt.nnunet.fingerprint import Fingerprint, bin_policy, extract_fingerprint, to_nnunet
from fedcmt.nnunet.network import build_network, input_parameters, uses_deep_supervision
from fedcmt.nnunet.paths import nnunet_paths
from fedcmt.nnunet.planning_options import NETWORKS, PLANNERS, PlanningOptions
from fedcmt.nnunet.plans import _divisible, _fits, check_architectures_agree, localise_plans, plan_federation

SAMPLES = 10_000
FIRST = "encoder.stages.0.0.convs.0.conv.weight"
INTENSITIES = "foreground_intensity_properties_per_channel"


def _extract(folder: Path, mode: str = "consensus", min_cases: int = 1) -> Fingerprint:
    return extract_fingerprint(
        folder, **dataclasses.asdict(bin_policy(mode)), samples_per_case=SAMPLES, min_cases=min_cases
    )


def _stock_plans(pooled: Path, work: Path, planner: str, cases: int, monkeypatch: pytest.MonkeyPatch) -> dict:
    """What nnU-Net's own extractor and planner write, with threads instead of the processes it spawns and forks."""
    threads = SimpleNamespace(get_context=lambda _: SimpleNamespace(Pool=ThreadPool))
    monkeypatch.setattr(fingerprint_extractor, "multiprocessing", threads)
    monkeypatch.setattr("nnunetv2.utilities.utils.Pool", ThreadPool)
    preprocessed = work / "stock"
    with nnunet_paths(pooled.parent, preprocessed):
        extractor = fingerprint_extractor.DatasetFingerprintExtractor(pooled.name, 1)
        extractor.show_progress_bar = False
        extractor.num_foreground_voxels_for_intensitystats = SAMPLES * cases
        extractor.run()
        stock = PLANNERS[planner](pooled.name)
        stock.plan_experiment()
        return json.loads((preprocessed / pooled.name / f"{stock.plans_identifier}.json").read_text())


def _assert_same_plans(ours: dict, stock: dict) -> None:
    ours, stock = copy.deepcopy(ours), copy.deepcopy(stock)
    assert ours.pop("dataset_name") != stock.pop("dataset_name")
    mine, theirs = ours.pop(INTENSITIES), stock.pop(INTENSITIES)
    assert ours == stock
    assert list(mine) == list(theirs)
    for channel, wanted in theirs.items():
        assert set(mine[channel]) == set(wanted) - {"min", "max"}
        for name, value in mine[channel].items():
            # nnU-Net adds up in float32; percentiles are right to half a bin.
            assert value == pytest.approx(wanted[name], rel=1e-4 if name in ("mean", "std") else 2e-3), name


@pytest.mark.parametrize("planner", ["ExperimentPlanner", "nnUNetPlannerResEncM"])
@pytest.mark.parametrize(
    ("cases", "channels", "margin"),
    [
        (geometries(11, (30, 36, 42), (1.2, 1.0, 0.8)), ("T1", "FLAIR"), 4),
        (geometries(12, (30, 40, 36), (0.8, 1.0, 1.2)), ("T1",), 12),
        (geometries(11, (12, 64, 60), (6.0, 0.8, 0.9)), ("CT",), 2),
        (geometries(12, (60, 13, 64), (0.8, 5.0, 0.9)), ("CT", "zscore"), 2),
    ],
    ids=["mr-odd", "mr-even-masked", "ct-anisotropic-odd", "ct-anisotropic-even-transposed"],
)
def test_consensus_is_the_plan_of_the_pooled_data(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    cases: Sequence[Geometry],
    channels: Sequence[str],
    margin: int,
    planner: str,
) -> None:
    bounds = [(0, 3), (3, len(cases))]
    parts = [
        write_dataset(tmp_path / "sites" / f"Dataset{i:03d}_S", cases[a:b], channels=channels, margin=margin, first=a)
        for i, (a, b) in enumerate(bounds)
    ]
    plans = plan_federation(
        {f"site{i}": _extract(part) for i, part in enumerate(parts)}, PlanningOptions(planner=planner)
    )
    stock = _stock_plans(pool(tmp_path / "raw" / "Dataset009_Pool", parts), tmp_path, planner, len(cases), monkeypatch)
    _assert_same_plans(plans["site0"], stock)
    assert plans["site0"] == plans["site1"]
    assert plans["site0"] is not plans["site1"]


@pytest.mark.data
def test_consensus_on_real_images_is_the_plan_of_the_pooled_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    default = Path(__file__).parents[3] / "shared" / "data" / "nnUNet_raw"
    source = Path(os.environ.get("FEDCMT_REAL_DATA", default)) / "Dataset504_MSD_Hippocampus"
    if not source.is_dir():
        pytest.skip(f"no {source}; set FEDCMT_REAL_DATA to a folder with Dataset504_MSD_Hippocampus")
    parts = [tmp_path / "sites" / f"Dataset00{i}_Half" for i in range(2)]
    labels = sorted((source / "labelsTr").iterdir())
    for i, part in enumerate(parts):
        for name in ("imagesTr", "labelsTr"):
            (part / name).mkdir(parents=True)
        for label in labels[i::2]:
            case = label.name.removesuffix(".nii.gz")
            (part / "labelsTr" / label.name).symlink_to(label)
            (part / "imagesTr" / f"{case}_0000.nii.gz").symlink_to(source / "imagesTr" / f"{case}_0000.nii.gz")
        (part / "dataset.json").write_text((source / "dataset.json").read_text())
    plans = plan_federation({part.name: _extract(part) for part in parts}, PlanningOptions())
    pooled = pool(tmp_path / "raw" / "Dataset009_Pool", parts)
    _assert_same_plans(
        plans[parts[0].name], _stock_plans(pooled, tmp_path, "ExperimentPlanner", len(labels), monkeypatch)
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("different")
    regions: dict[str, int | list[int]] = {"background": 0, "organ": 1}
    return {
        "mr": write_dataset(
            root / "Dataset001_MR", geometries(6, (38, 44, 50), (1.0, 0.9375, 1.1)), channels=("T1", "FLAIR")
        ),
        "ct": write_dataset(
            root / "Dataset002_CT", geometries(5, (30, 72, 66), (3.0, 0.85, 0.9)), channels=("CT",), labels=regions
        ),
        "thick": write_dataset(root / "Dataset003_Thick", geometries(7, (26, 96, 90), (6.0, 0.75, 0.75))),
    }


@pytest.fixture(scope="module")
def coarse(folders: dict[str, Path]) -> dict[str, Fingerprint]:
    return {site: _extract(folder, "architecture") for site, folder in folders.items()}


@pytest.fixture(scope="module")
def architecture_plans(coarse: dict[str, Fingerprint]) -> dict[str, dict]:
    return plan_federation(coarse, PlanningOptions(mode="architecture", base_features=8))


def _chosen(plans: dict) -> dict:
    return plans["configurations"]["3d_fullres"]


def _assert_usable(plans: dict[str, dict]) -> None:
    """One topology, patches it divides, at least 4 voxels at the bottom, and a network that takes them."""
    check_architectures_agree(plans)
    for plan in plans.values():
        arch = _chosen(plan)["architecture"]["arch_kwargs"]
        edges = np.array(_chosen(plan)["patch_size"]) / np.prod(arch["strides"], axis=0)
        assert (edges == np.round(edges)).all()
        assert edges.min() >= 4
        lengths = {len(arch[k]) for k in ("features_per_stage", "kernel_sizes", "strides")}
        assert lengths == {arch["n_stages"]}
        assert len(arch["n_conv_per_stage_decoder"]) == arch["n_stages"] - 1


def test_architecture_mode_shares_only_the_topology(
    coarse: dict[str, Fingerprint], architecture_plans: dict[str, dict]
) -> None:
    plans = architecture_plans
    _assert_usable(plans)
    arch = _chosen(plans["ct"])["architecture"]["arch_kwargs"]
    # The thinnest patch has 26 slices at most: 24 / 4 = 6 and 24 / 8 = 3, or 26..32 / 8 = 4.
    assert arch["n_stages"] == 4
    assert arch["kernel_sizes"] == [[3, 3, 3]] * 4
    assert arch["strides"] == [[1, 1, 1]] + [[2, 2, 2]] * 3
    assert arch["features_per_stage"] == [8, 16, 32, 64]
    assert arch["n_conv_per_stage"] == [2] * 4
    assert {site: _chosen(p)["normalization_schemes"] for site, p in plans.items()} == {
        "mr": ["ZScoreNormalization"] * 2,
        "ct": ["CTNormalization"],
        "thick": ["ZScoreNormalization"],
    }
    assert len({tuple(_chosen(p)["patch_size"]) for p in plans.values()}) == 3
    assert _chosen(plans["thick"])["spacing"][0] > 5
    assert all(list(p["configurations"]) == ["3d_fullres"] for p in plans.values())
    alone = plan_federation({"mr": coarse["mr"]}, PlanningOptions(base_features=8))["mr"]
    assert _chosen(plans["mr"])["batch_size"] == _chosen(alone)["batch_size"]
    assert _chosen(plans["mr"])["spacing"] == _chosen(alone)["spacing"]
    distance = np.abs(np.array(_chosen(plans["mr"])["patch_size"]) - _chosen(alone)["patch_size"])
    assert (distance <= 4).all(), "the nearest multiple of 8"


def test_architecture_mode_with_residual_encoder(coarse: dict[str, Fingerprint]) -> None:
    options = PlanningOptions(mode="architecture", planner="nnUNetPlannerResEncM", max_stages=3, batch_size=3)
    plans = plan_federation(coarse, options)
    _assert_usable(plans)
    architecture = _chosen(plans["mr"])["architecture"]
    assert architecture["network_class_name"].endswith("ResidualEncoderUNet")
    assert architecture["arch_kwargs"]["n_blocks_per_stage"] == [1, 3, 4]
    assert architecture["arch_kwargs"]["features_per_stage"] == [32, 64, 128]
    assert {_chosen(p)["batch_size"] for p in plans.values()} == {3}


@pytest.mark.parametrize("limit", [(24, 24, 24), (32, 20, 50), (9, 30, 30), (200, 200, 200)])
@pytest.mark.parametrize("mode", ["consensus", "architecture"])
def test_patches_stay_within_the_limit(coarse: dict[str, Fingerprint], limit: tuple[int, int, int], mode: str) -> None:
    sites = coarse if mode == "architecture" else {"thick": coarse["thick"]}
    plans = plan_federation(sites, PlanningOptions(mode=mode, max_patch_size=limit, base_features=8))
    _assert_usable(plans)
    for plan in plans.values():
        allowed = np.array(limit)[plan["transpose_forward"]]
        assert (np.array(_chosen(plan)["patch_size"]) <= allowed).all()
    free = plan_federation(sites, PlanningOptions(mode=mode, base_features=8))
    for site, plan in plans.items():
        assert _chosen(plan)["median_image_size_in_voxels"] == _chosen(free[site])["median_image_size_in_voxels"]
    if min(limit) == 200:
        assert plans == free


@pytest.mark.parametrize("mode", ["consensus", "architecture", "own"])
def test_the_limit_is_in_array_axis_order(tmp_path: Path, mode: str) -> None:
    """The y axis is the coarse one here, so nnU-Net puts it first."""
    folder = write_dataset(tmp_path / "Dataset004_Coronal", geometries(5, (64, 26, 60), (0.8, 4.0, 0.8)))
    options = PlanningOptions(mode=mode, max_patch_size=(16, 24, 48), base_features=8)
    plan = plan_federation({"a": _extract(folder)}, options)["a"]
    assert plan["transpose_forward"] == [1, 0, 2]
    assert _chosen(plan)["patch_size"][0] > 16
    assert _chosen(plan)["patch_size"][1:] == [16, 48]


@pytest.mark.parametrize(
    ("length", "limit", "stages", "expected"),
    [
        (33, None, 4, 32),  # nearest: the memory was planned for 33
        (37, None, 4, 40),
        (36, None, 4, 40),
        (25, None, 4, 32),  # nearest is 24, three voxels in the lowest stage
        (47, 47, 3, 44),  # nearest is 48, beyond the limit
        (45, 45, 3, 44),
    ],
)
def test_patches_become_the_nearest_divisible_size(length: int, limit: int | None, stages: int, expected: int) -> None:
    assert _fits([length], [limit], stages)
    assert _divisible(length, limit, stages) == expected


@pytest.mark.parametrize(
    ("length", "limit", "fits"), [(25, None, True), (24, None, False), (32, 32, True), (31, 31, False)]
)
def test_the_lowest_stage_keeps_four_voxels(length: int, limit: int | None, fits: bool) -> None:
    assert _fits([64, length], [None, limit], 4) is fits


def test_stages_batch_and_stem_can_be_set(coarse: dict[str, Fingerprint]) -> None:
    options = PlanningOptions(max_stages=2, batch_size=5, extra_stem_convolution=True, base_features=4, max_features=6)
    plans = plan_federation({"a": coarse["thick"]}, options)["a"]
    arch = _chosen(plans)["architecture"]["arch_kwargs"]
    assert (arch["n_stages"], arch["n_conv_per_stage"], arch["features_per_stage"]) == (2, [3, 2], [4, 6])
    assert arch["kernel_sizes"][-1] == [3, 3, 3]
    assert _chosen(plans)["batch_size"] == 5
    block = _chosen(plans)["architecture"]
    network = get_network_from_plans(block["network_class_name"], arch, block["_kw_requires_import"], 1, 3)
    assert "encoder.stages.0.0.convs.2.conv.weight" in dict(network.named_parameters())
    untouched = plans["configurations"]["2d"]["architecture"]["arch_kwargs"]
    assert untouched["n_conv_per_stage"][0] == 2


@pytest.mark.parametrize("mode", ["consensus", "architecture"])
def test_the_linear_adapter_is_a_network_nnunet_builds(coarse: dict[str, Fingerprint], mode: str) -> None:
    options = PlanningOptions(
        mode=mode, extra_stem_convolution=True, adapter="linear", max_stages=3, base_features=4, max_features=6
    )
    sites = coarse if mode == "architecture" else {"mr": coarse["mr"]}
    for site, plan in plan_federation(sites, options).items():
        channels = len(coarse[site].channel_names)
        network = build_network(plan, "3d_fullres", channels, coarse[site].dataset_json())
        assert input_parameters(network) == {FIRST}
        assert dict(network.named_parameters())[FIRST].shape == (4, channels, 1, 1, 1)
        outputs = network(torch.zeros(1, channels, 16, 24, 32))
        heads = outputs[0].shape[1]
        assert [tuple(o.shape) for o in outputs] == [(1, heads, 16, 24, 32), (1, heads, 8, 12, 16)]


@pytest.mark.parametrize("mode", ["consensus", "architecture"])
def test_the_linear_adapter_changes_nothing_else_in_the_plans(coarse: dict[str, Fingerprint], mode: str) -> None:
    options = PlanningOptions(mode=mode, extra_stem_convolution=True, base_features=4)
    linear, conv = (
        plan_federation({"mr": coarse["mr"]}, dataclasses.replace(options, adapter=adapter))["mr"]
        for adapter in ("linear", "conv")
    )
    assert linear != conv
    names = [_chosen(plan)["architecture"].pop("network_class_name") for plan in (linear, conv)]
    assert [name.split(".")[-1] for name in names] == ["LinearAdapterUNet", "PlainConvUNet"]
    assert linear == conv, "other configurations and all other fields stay nnU-Net's"


@pytest.mark.parametrize("mode", ["consensus", "architecture"])
@pytest.mark.parametrize("network", ["UNet3D", "TransUNet3D"])
def test_our_networks_take_every_patch_that_is_planned_for_them(
    coarse: dict[str, Fingerprint], network: str, mode: str
) -> None:
    """Also where nnU-Net would leave coarse axes alone: these networks halve every axis."""
    options = PlanningOptions(mode=mode, network=network, base_features=4, max_features=8, max_stages=4)
    sites = coarse if mode == "architecture" else {"thick": coarse["thick"]}
    plans = plan_federation(sites, options)
    check_architectures_agree(plans)
    for site, plan in plans.items():
        assert _chosen(plan)["architecture"] == {
            "network_class_name": f"fedcmt.models.{'unet3d' if network == 'UNet3D' else 'trans_unet3d'}.{network}",
            "arch_kwargs": {"n_stages": 4, "features_per_stage": [4, 8, 8, 8], "deep_supervision": False},
            "_kw_requires_import": [],
        }
        patch = _chosen(plan)["patch_size"]
        assert all(length % 8 == 0 and length >= 32 for length in patch)
        channels = len(coarse[site].channel_names)
        with torch.device("meta"):
            built = build_network(plan, "3d_fullres", channels, coarse[site].dataset_json())
            assert built(torch.zeros(1, channels, *patch)).shape[2:] == tuple(patch)


@pytest.mark.parametrize("network", ["UNet3D", "MUNet"])
def test_our_networks_change_only_topology_and_patch(coarse: dict[str, Fingerprint], network: str) -> None:
    planned, own = (
        _chosen(plan_federation({"thick": coarse["thick"]}, PlanningOptions(network=name, base_features=8))["thick"])
        for name in ("plan", network)
    )
    assert any(1 in stride for stride in planned["architecture"]["arch_kwargs"]["strides"][1:])
    changed = {field for field in planned if planned[field] != own[field]}
    assert changed <= {"architecture", "patch_size"}


def test_munet_for_slices_of_224_is_the_published_one(tmp_path: Path) -> None:
    folder = write_dataset(
        tmp_path / "Dataset007_Four", [((7, 224, 226), (1.0, 1.0, 1.0))] * 5, channels=("FLAIR", "T1", "T1ce", "T2")
    )
    options = PlanningOptions(
        network="MUNet",
        configuration="2d",
        base_features=16,
        max_patch_size=(224, 224, 224),
        network_options={"cmm_norm": "pre_ln"},
    )
    chosen = plan_federation({"a": _extract(folder)}, options)["a"]["configurations"]["2d"]
    assert chosen["patch_size"] == [224, 224]
    assert chosen["architecture"] == {
        "network_class_name": "fedcmt.models.munet.MUNet",
        "arch_kwargs": {
            "n_stages": 5,
            "stem_features": 16,
            "features_per_stage": [32, 64, 128, 256, 512],
            "dimensions": 2,
            "strides": [[1, 1], *[[2, 2]] * 5],
            "cmm_norm": "pre_ln",
        },
        "_kw_requires_import": [],
    }


@pytest.mark.parametrize("mode", ["consensus", "own"])
@pytest.mark.parametrize("configuration", ["2d", "3d_fullres"])
def test_munet_takes_every_patch_that_is_planned_for_it(
    coarse: dict[str, Fingerprint], configuration: str, mode: str
) -> None:
    options = PlanningOptions(
        mode=mode, network="MUNet", configuration=configuration, base_features=4, max_features=8, max_stages=3
    )
    for site in ("mr", "thick"):
        plan = plan_federation({site: coarse[site]}, options)[site]
        chosen, channels = plan["configurations"][configuration], len(coarse[site].channel_names)
        patch, kwargs = chosen["patch_size"], chosen["architecture"]["arch_kwargs"]
        assert (kwargs["n_stages"], kwargs["dimensions"]) == (len(kwargs["strides"]) - 1, len(patch))
        # In 2D nnU-Net's own limit of 512 features holds.
        assert kwargs["features_per_stage"] == ([8, 16, 32] if configuration == "2d" else [8, 8, 8])
        assert all(length % 8 == 0 and length >= 32 for length in patch)
        assert uses_deep_supervision(plan, configuration)
        with torch.device("meta"):
            network = build_network(plan, configuration, channels, coarse[site].dataset_json())
            outputs = network(torch.zeros(1, channels, *patch))
        assert input_parameters(network) == frozenset()
        assert [tuple(o.shape[2:]) for o in outputs] == [tuple(n // f for n in patch) for f in (1, 2, 4)]


@pytest.mark.parametrize(("limit", "stages"), [(9, 1), (16, 2)])
def test_a_munet_of_one_stage_has_one_output_and_one_of_two_is_supervised_at_both(
    coarse: dict[str, Fingerprint], limit: int, stages: int
) -> None:
    options = PlanningOptions(network="MUNet", base_features=4, max_patch_size=(limit,) * 3)
    plan = plan_federation({"mr": coarse["mr"]}, options)["mr"]
    assert _chosen(plan)["architecture"]["arch_kwargs"]["n_stages"] == stages
    assert uses_deep_supervision(plan, "3d_fullres") is (stages > 1)
    output = build_network(plan, "3d_fullres", 2, coarse["mr"].dataset_json())(torch.zeros(1, 2, 8, 8, 8))
    sizes = [tuple(o.shape) for o in output] if stages > 1 else [tuple(output.shape)]
    assert sizes == [(1, 3, 8, 8, 8), (1, 3, 4, 4, 4)][:stages]


def test_munet_of_one_architecture_needs_as_many_channels_everywhere(coarse: dict[str, Fingerprint]) -> None:
    options = PlanningOptions(mode="architecture", network="MUNet", base_features=4, max_stages=2)
    with pytest.raises(
        ValueError, match=r"\{'ct': 1, 'mr': 2, 'thick': 1\} channels, but MUNet has an encoder for each"
    ):
        plan_federation(coarse, options)
    plans = plan_federation({site: coarse[site] for site in ("ct", "thick")}, options)
    check_architectures_agree(plans)


@pytest.mark.parametrize("mode", ["consensus", "architecture"])
def test_minmax_replaces_every_channel_s_normalisation(coarse: dict[str, Fingerprint], mode: str) -> None:
    options = PlanningOptions(mode=mode, base_features=8)
    sites = {"mr": coarse["mr"]} if mode == "consensus" else {site: coarse[site] for site in ("mr", "ct")}
    planned = plan_federation(sites, options)
    for site, plan in plan_federation(sites, dataclasses.replace(options, normalization="minmax")).items():
        channels = len(coarse[site].channel_names)
        for name, configuration in plan["configurations"].items():
            if "inherits_from" not in configuration:
                assert configuration.pop("normalization_schemes") == ["MaskedMinMaxNormalization"] * channels
                assert configuration.pop("use_mask_for_norm") == [True] * channels
                for field in ("normalization_schemes", "use_mask_for_norm"):
                    del planned[site]["configurations"][name][field]
    assert plan == planned[site]


@pytest.mark.parametrize("limit", [(24, 24, 24), (9, 30, 30)])
def test_our_networks_keep_the_limit_of_the_patch(coarse: dict[str, Fingerprint], limit: tuple[int, int, int]) -> None:
    options = PlanningOptions(network="UNet3D", max_patch_size=limit, base_features=4)
    plan = plan_federation({"thick": coarse["thick"]}, options)["thick"]
    stages = _chosen(plan)["architecture"]["arch_kwargs"]["n_stages"]
    patch = np.array(_chosen(plan)["patch_size"])
    assert (patch <= np.array(limit)[plan["transpose_forward"]]).all()
    assert (patch % 2 ** (stages - 1) == 0).all()


def test_features_that_the_heads_do_not_divide_are_named_when_the_network_is_built(
    coarse: dict[str, Fingerprint],
) -> None:
    options = PlanningOptions(network="TransUNet3D", base_features=5, max_stages=3)
    plan = plan_federation({"mr": coarse["mr"]}, options)["mr"]
    with pytest.raises(ValueError, match=r"heads 8 and 20 features.*Plan with other base_features"):
        build_network(plan, "3d_fullres", 2, coarse["mr"].dataset_json())


def test_sites_with_different_adapters_are_noticed(coarse: dict[str, Fingerprint]) -> None:
    options = PlanningOptions(mode="architecture", extra_stem_convolution=True, base_features=4)
    linear, conv = (
        plan_federation(coarse, dataclasses.replace(options, adapter=adapter)) for adapter in ("linear", "conv")
    )
    check_architectures_agree(linear)
    with pytest.raises(
        ValueError, match=r"network_class_name differs \(ct has .*PlainConvUNet.*mr has .*LinearAdapter"
    ):
        check_architectures_agree({"mr": linear["mr"], "ct": conv["ct"]})


@pytest.mark.parametrize("network", ["plan", *NETWORKS])
def test_own_mode_is_what_is_planned_for_each_site_alone(coarse: dict[str, Fingerprint], network: str) -> None:
    options = PlanningOptions(network=network, base_features=8)
    plans = plan_federation(coarse, dataclasses.replace(options, mode="own"))
    assert plans.keys() == coarse.keys()
    for site, plan in plans.items():
        alone = plan_federation({site: coarse[site]}, options)[site]
        assert plan == alone | {"configurations": {"3d_fullres": _chosen(alone)}}


def test_own_mode_lets_topologies_differ(coarse: dict[str, Fingerprint]) -> None:
    plans = plan_federation(coarse, PlanningOptions(mode="own", base_features=8))
    kernels = {s: _chosen(p)["architecture"]["arch_kwargs"]["kernel_sizes"][0] for s, p in plans.items()}
    assert (kernels["mr"], kernels["thick"]) == ([3, 3, 3], [1, 3, 3])
    with pytest.raises(ValueError, match="another architecture"):
        check_architectures_agree(plans)


def test_own_mode_keeps_the_limits_of_the_job(coarse: dict[str, Fingerprint]) -> None:
    options = PlanningOptions(mode="own", max_patch_size=(16, 32, 40), batch_size=3, max_stages=3, base_features=4)
    for plan in plan_federation(coarse, options).values():
        allowed = np.array((16, 32, 40))[plan["transpose_forward"]]
        assert (np.array(_chosen(plan)["patch_size"]) <= allowed).all()
        assert _chosen(plan)["batch_size"] == 3
        assert _chosen(plan)["architecture"]["arch_kwargs"]["features_per_stage"] == [4, 8, 16]


def test_true_number_of_cases_caps_the_batch(coarse: dict[str, Fingerprint]) -> None:
    """Twice the cases allow twice the batch, where 5 % of the voxels is the cap."""
    one = coarse["mr"]
    many = dataclasses.replace(
        one,
        num_cases=600,
        axes=tuple(tuple((s, k, n * 100) for s, k, n in table) for table in one.axes),  # type: ignore[arg-type]
        crop=tuple((b, n * 100) for b, n in one.crop),
    )
    small, large = (
        _chosen(plan_federation({"a": f}, PlanningOptions(base_features=4))["a"])["batch_size"] for f in (one, many)
    )
    assert small == 2
    assert large > small


def test_different_data_need_architecture_mode(coarse: dict[str, Fingerprint]) -> None:
    with pytest.raises(ValueError, match=r"channel_names differ: ct has .*mode to 'architecture'"):
        plan_federation(coarse, PlanningOptions())
    with pytest.raises(ValueError, match="no site"):
        plan_federation({}, PlanningOptions())


def test_too_small_images_are_refused(folders: dict[str, Path]) -> None:
    folder = write_dataset(folders["mr"].parent / "Dataset005_Thin", [((5, 40, 40), (1.0, 1.0, 1.0))] * 5, margin=0)
    with pytest.raises(ValueError, match="too small for a U-Net of two stages"):
        plan_federation({"thin": _extract(folder)}, PlanningOptions(mode="architecture"))


def test_planning_leaves_nothing_behind(
    coarse: dict[str, Fingerprint], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("nnUNet_raw", "before")
    monkeypatch.delenv("nnUNet_preprocessed", raising=False)
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")  # nnU-Net's own planner fails with this
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    plan_federation({"a": coarse["mr"]}, PlanningOptions())
    broken = dataclasses.replace(coarse["mr"], labels=())
    monkeypatch.setattr(PLANNERS["ExperimentPlanner"], "determine_resampling", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        plan_federation({"a": broken}, PlanningOptions())
    assert os.environ["nnUNet_raw"] == "before"
    assert "nnUNet_preprocessed" not in os.environ
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"patch": 3}, r"unknown options \['patch'\]; known ones are \['mode', 'planner'"),
        ({"mode": "both"}, "planning.mode is 'both'"),
        ({"planner": "Mine"}, "planning.planner is 'Mine'"),
        ({"configuration": "3d_cascade_fullres"}, "planning.configuration"),
        ({"base_features": 0}, "planning.base_features"),
        ({"max_stages": 1}, "planning.max_stages"),
        ({"batch_size": 2.0}, "planning.batch_size"),
        ({"gpu_memory_gb": 0}, "planning.gpu_memory_gb"),
        ({"max_patch_size": [32, 32]}, "planning.max_patch_size"),
        ({"extra_stem_convolution": 1}, "planning.extra_stem_convolution"),
        ({"extra_stem_convolution": True, "planner": "nnUNetPlannerResEncL"}, "already separate"),
        ({"adapter": "lora"}, r"planning.adapter is 'lora', expected one of \['conv', 'linear'\]"),
        (
            {"network": "VNet"},
            r"planning.network is 'VNet', expected one of \['plan', 'UNet3D', 'TransUNet3D', 'MUNet', 'FedMEPDNet'\]",
        ),
        ({"network": "UNet3D", "configuration": "2d"}, "planning.network is 'UNet3D', a 3D network, but .* is '2d'"),
        ({"network": "UNet3D", "planner": "nnUNetPlannerResEncM"}, "for a residual encoder. Use ExperimentPlanner"),
        ({"network": "TransUNet3D", "extra_stem_convolution": True}, "Leave planning.extra_stem_convolution"),
        ({"network": "MUNet", "planner": "nnUNetPlannerResEncM"}, "for a residual encoder. Use ExperimentPlanner"),
        ({"network": "MUNet", "extra_stem_convolution": True}, "Leave planning.extra_stem_convolution"),
        ({"network": "MUNet", "network_options": {"norm": "batch"}}, "norm is 'batch', whose running statistics"),
        (
            {"network": "MUNet", "network_options": {"norm": "layer"}},
            r"network_options.norm is 'layer', expected one of",
        ),
        (
            {"network": "MUNet", "network_options": {"depth": 2}},
            r"'MUNet' takes no \['depth'\], only \['norm', 'cmm_norm'",
        ),
        ({"network": "UNet3D", "network_options": {"norm": "group"}}, r"'UNet3D' takes no \['norm'\], only \[\]"),
        ({"network_options": {"norm": "group"}}, r"network 'plan' takes no \['norm'\]"),
        ({"network_options": ["norm"]}, "expected an object"),
        ({"normalization": "zscore"}, r"planning.normalization is 'zscore', expected one of \['plan', 'minmax'\]"),
        ({"adapter": "linear"}, "planning.extra_stem_convolution is false. Set it to true"),
        ({"adapter": "linear", "planner": "nnUNetPlannerResEncM"}, "nnUNetPlannerResEncM plans a residual encoder"),
        (
            {"adapter": "linear", "extra_stem_convolution": True, "configuration": "2d"},
            "planning.configuration is '2d'. Use 'conv' or a 3D configuration",
        ),
    ],
)
def test_bad_options_are_named(content: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PlanningOptions.from_dict(content)


def test_options_from_json() -> None:
    options = PlanningOptions.from_dict({"mode": "architecture", "max_patch_size": [32, 40, 48]})
    assert options == PlanningOptions(mode="architecture", max_patch_size=(32, 40, 48))


def _localised(plans: dict, folder: Path, **changes: Any) -> dict:
    arguments: dict[str, Any] = {
        "site": "ct",
        "job": "demo",
        "dataset_name": folder.name,
        "dataset_json": json.loads((folder / "dataset.json").read_text()),
        "mode": "architecture",
        "local": to_nnunet(_extract(folder)),
    }
    return localise_plans(plans, **(arguments | changes))


@pytest.mark.parametrize("mode", ["architecture", "own"])
def test_localised_plans_are_the_sites_own(coarse: dict[str, Fingerprint], folders: dict[str, Path], mode: str) -> None:
    plans = plan_federation(coarse, PlanningOptions(mode=mode, base_features=8))["mr"]
    before = copy.deepcopy(plans)
    local = to_nnunet(_extract(folders["mr"]))
    local[INTENSITIES]["0"]["mean"] += 1
    own = _localised(plans, folders["mr"], site="mr", mode=mode, local=local)
    assert plans == before
    assert (own["dataset_name"], own["plans_name"]) == ("Dataset001_MR", "nnUNetPlans_demo_mr")
    assert own["image_reader_writer"] == "SimpleITKIO"
    assert own[INTENSITIES] == local[INTENSITIES] != before[INTENSITIES]
    exact = np.median(local["spacings"], 0)[own["transpose_forward"]]
    assert _chosen(own)["spacing"] == pytest.approx(exact, abs=1e-12)
    assert _chosen(own)["spacing"] != _chosen(before)["spacing"]
    assert json.loads(json.dumps(own)) == own


def test_data_identifier_follows_what_preprocessing_depends_on(
    architecture_plans: dict[str, dict], folders: dict[str, Path]
) -> None:
    def identifier(folder: str = "ct", dataset_json: dict | None = None, **changes: Any) -> str:
        plans, local = copy.deepcopy(architecture_plans[folder]), to_nnunet(_extract(folders[folder]))
        local[INTENSITIES]["0"]["mean"] += changes.pop("mean", 0)
        _chosen(plans).update(changes)
        more = {} if dataset_json is None else {"dataset_json": dataset_json}
        return _chosen(_localised(plans, folders[folder], local=local, **more))["data_identifier"]

    base = identifier()
    assert base.startswith("fedcmt_")
    assert len(base) == 17
    assert identifier(patch_size=[64, 64, 64], batch_size=9) == base
    content = json.loads((folders["ct"] / "dataset.json").read_text())
    others = [
        identifier(mean=1),
        identifier(use_mask_for_norm=[True]),
        identifier(normalization_schemes=["NoNormalization"]),
        identifier(normalization_schemes=["MaskedMinMaxNormalization"]),
        identifier(resampling_fn_data_kwargs={"order": 1}),
        identifier(dataset_json=content | {"labels": {"background": 0, "other": 1, "organ": 2}}),
        identifier("mr"),
    ]
    assert len({base, *others}) == 8
    assert identifier("mr", mean=1) == identifier("mr"), "z-score is per image"
    ranged = {"normalization_schemes": ["MaskedMinMaxNormalization"]}
    assert identifier(mean=1, **ranged) == identifier(**ranged), "and so is min-max"


def test_localising_refuses_plans_for_other_channels(
    architecture_plans: dict[str, dict], folders: dict[str, Path]
) -> None:
    with pytest.raises(ValueError, match=r"'normalization_schemes': 2.*1 channels \['CT'\]"):
        _localised(architecture_plans["mr"], folders["ct"])
    with pytest.raises(ValueError, match="in architecture mode, local must not be None"):
        _localised(architecture_plans["ct"], folders["ct"], local=None)
    with pytest.raises(ValueError, match="in own mode, local must not be None"):
        _localised(architecture_plans["ct"], folders["ct"], mode="own", local=None)
    with pytest.raises(ValueError, match="in consensus mode, local must be None"):
        _localised(architecture_plans["ct"], folders["ct"], mode="consensus")


def test_consensus_plans_keep_the_pooled_statistics(folders: dict[str, Path]) -> None:
    plans = plan_federation({"ct": _extract(folders["ct"])}, PlanningOptions())["ct"]
    own = _localised(plans, folders["ct"], mode="consensus", local=None)
    assert own[INTENSITIES] == plans[INTENSITIES]
    identifiers = {name: c["data_identifier"] for name, c in own["configurations"].items()}
    assert len(set(identifiers.values())) == len(identifiers), "2d and 3d differ in spacing"


def test_other_architectures_are_noticed(architecture_plans: dict[str, dict]) -> None:
    plans = copy.deepcopy(architecture_plans)
    _chosen(plans["mr"])["architecture"]["arch_kwargs"]["features_per_stage"][1] = 17
    with pytest.raises(ValueError, match=r"another architecture: 3d_fullres\.features_per_stage .*mr has \[8, 17"):
        check_architectures_agree(plans)
    check_architectures_agree({"mr": plans["mr"]})
