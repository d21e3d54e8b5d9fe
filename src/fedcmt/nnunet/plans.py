"""Plans for a federation, decided on the server by nnU-Net's own planner from fingerprints, without images.

``consensus``: the fingerprints are merged and planned once; with default options the plans are those that
``nnUNetv2_plan_experiment`` writes for the pooled data. ``architecture``: every site is planned alone, and only the
topology is made common; spacing, patch size, normalisation, channels and labels stay each site's own. ``own``: every
site is planned alone, and the topology is its own too.
"""

import contextlib
import copy
import hashlib
import io
import json
import logging
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from nnunetv2.configuration import ANISO_THRESHOLD
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_dataset_json
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

from fedcmt.data.checks import channel_names
from fedcmt.json_file import write_json
from fedcmt.models.adapters import LinearAdapterUNet
from fedcmt.models.fedmepd import HEADS, FedMEPDNet
from fedcmt.models.munet import MUNet, planned_strides
from fedcmt.models.sequences import canonical
from fedcmt.nnunet.fingerprint import Fingerprint, FingerprintMismatchError, bin_policy, merge, to_nnunet
from fedcmt.nnunet.normalization import MaskedMinMaxNormalization
from fedcmt.nnunet.paths import nnunet_paths
from fedcmt.nnunet.planning_options import NETWORKS, PLANNED_NETWORK, PLANNERS, PlanningOptions

logger = logging.getLogger(__name__)

Plans = dict[str, Any]

_MIN_EDGE = 4  # nnU-Net's UNet_featuremap_min_edge_length
_DATASET = "Dataset001_Federation"
_WITHOUT_INTENSITIES = frozenset(
    (
        *("ZScoreNormalization", "NoNormalization", "RescaleTo01Normalization", "RGBTo01Normalization"),
        MaskedMinMaxNormalization.__name__,
    )
)


def plan_federation(fingerprints: Mapping[str, Fingerprint], options: PlanningOptions) -> dict[str, Plans]:
    """Plans for every site, from fingerprints alone.

    Args:
      fingerprints: Site name to fingerprint.
      options: The job's planning options.

    Returns:
      Site name to nnU-Net plans, plain JSON types, not yet localised (see `localise_plans`).

    Raises:
      ValueError: If no site, too small images, or in consensus mode different channels or labels.
    """
    if not fingerprints:
        raise ValueError("planning: no site sent a fingerprint")
    sites = sorted(fingerprints)
    if options.mode == "own":
        return {site: _own_plans(fingerprints[site], options, site) for site in sites}
    if options.mode == "architecture":
        return _with_common_topology({site: _plan(fingerprints[site], options, site) for site in sites}, options)
    try:
        pooled = merge([fingerprints[site] for site in sites], sites)
    except FingerprintMismatchError as error:
        raise ValueError(
            f"planning: {error}. Consensus plans need one kind of data; set planning.mode to 'architecture' to share "
            "only the network's topology, or make the sites' dataset.json agree."
        ) from error
    plans = _plan_alone(pooled, options, "the federation")
    return {site: copy.deepcopy(plans) for site in sites}


def localise_plans(
    plans: Plans,
    *,
    site: str,
    role: str = "site",
    job: str,
    dataset_name: str,
    dataset_json: dict,
    mode: str,
    local: dict | None,
) -> Plans:
    """Received plans as one site uses them.

    Args:
      plans: What `plan_federation` returned for this site.
      site: The site's name.
      role: "site" or "fusion"; a fusion site's FedMEPDNet is not calibrated.
      job: The job's name; with the site's it names the plans.
      dataset_name: nnU-Net's name of the site's data set, "Dataset123_Name".
      dataset_json: The site's dataset.json.
      mode: The planning mode.
      local: `to_nnunet` of the site's own fingerprint, from which intensity properties and target spacing are taken; it
        may be finer than the one that was sent. None in consensus mode, where they are the federation's.

    Returns:
      A new dict. The data identifier is a hash of all that preprocessing depends on, so that equal preprocessing is
      shared between jobs and different preprocessing is never mixed up.

    Raises:
      ValueError: If ``local`` does not fit the mode, or the plans are for another number of channels.
    """
    bin_policy(mode)
    if (local is None) != (mode == "consensus"):
        raise ValueError(f"localise_plans: in {mode} mode, local must {'' if mode == 'consensus' else 'not '}be None")
    own = copy.deepcopy(plans)
    own["dataset_name"] = dataset_name
    own["plans_name"] = f"nnUNetPlans_{job}_{site}"
    own["image_reader_writer"] = determine_reader_writer_from_dataset_json(dataset_json, verbose=False).__name__
    if local is not None:
        own["foreground_intensity_properties_per_channel"] = copy.deepcopy(
            local["foreground_intensity_properties_per_channel"]
        )
        _use_own_spacing(own, local)
    channels = channel_names(dataset_json)
    for name, configuration in own["configurations"].items():
        if "inherits_from" in configuration:
            continue  # its data are its parent's
        _check_channels(configuration, own, channels, where=f"plans for site {site!r}, configuration {name!r}")
        configuration["data_identifier"] = _data_identifier(own, configuration, dataset_json)
    return with_sequences(own, channels, calibrated=role == "site")


def with_sequences(plans: Plans, channels: Sequence[str], *, calibrated: bool) -> Plans:
    """Plans whose `FedMEPDNet`, if that is their network, is for these channels; others as they are.

    Args:
      plans: Not changed.
      channels: nnU-Net's channel names in the site's order.
      calibrated: Whether features are calibrated by anchors: at every site but the one they come from. Plans that say
        false themselves are for a federation without anchors.
    """
    own = copy.deepcopy(plans)
    for configuration in own["configurations"].values():
        architecture = configuration.get("architecture", {})
        if architecture.get("network_class_name") == _path(FedMEPDNet):
            arguments = architecture["arch_kwargs"]
            arguments["sequences"] = list(canonical(channels))
            arguments["calibrated"] = calibrated and arguments.get("calibrated", True)
    return own


def check_architectures_agree(plans_by_site: Mapping[str, Plans]) -> None:
    """Raise unless all sites' plans build the same networks, apart from input channels and classes.

    Raises:
      ValueError: Naming the first field that differs, the sites and their values.
    """
    networks = {site: _architecture_fields(plans) for site, plans in sorted(plans_by_site.items())}
    for field in sorted({field for network in networks.values() for field in network}):
        values = {site: network.get(field, "nothing") for site, network in networks.items()}
        if len(set(values.values())) > 1:
            listed = ", ".join(f"{site} has {value}" for site, value in values.items())
            raise ValueError(
                f"plans from another architecture: {field} differs ({listed}). Use the plans that this job's server "
                "sent, and remove plans of earlier jobs."
            )


class _FromFingerprint(ExperimentPlanner):
    """Mixin that lets one of nnU-Net's planners run without images and within the job's limits."""

    options: PlanningOptions

    def determine_reader_writer(self) -> type[SimpleITKIO]:
        return SimpleITKIO

    @staticmethod
    def static_estimate_VRAM_usage(
        patch_size: tuple[int, ...],
        input_channels: int,
        output_channels: int,
        arch_class_name: str,
        arch_kwargs: dict,
        arch_kwargs_req_import: tuple[str, ...],
    ) -> int:
        """Same number as nnU-Net's, without memory for the weights and without changing the process's thread count."""
        with torch.device("meta"):
            network = get_network_from_plans(
                arch_class_name, arch_kwargs, arch_kwargs_req_import, input_channels, output_channels, allow_init=False
            )
        return network.compute_conv_feature_map_size(patch_size)

    def get_plans_for_configuration(
        self, spacing: Any, median_shape: Any, data_identifier: str, approximate_n_voxels_dataset: float, _cache: dict
    ) -> dict:
        def plan(shape: Any) -> dict:
            return super(_FromFingerprint, self).get_plans_for_configuration(
                spacing, shape, data_identifier, approximate_n_voxels_dataset, _cache
            )

        chosen = data_identifier == self.generate_data_identifier(self.options.configuration)
        if not chosen or self.options.max_patch_size is None:
            return plan(median_shape)
        limit = np.array(self.options.max_patch_size)[self.determine_transpose()[0]][-len(spacing) :]
        # nnU-Net's initial patch is at most the median shape, so a smaller one makes it plan within the limit by its
        # own rules. It pads the patch to be divisible, which may pass the limit: then take the next multiple below.
        while True:
            result = plan(np.minimum(np.asarray(median_shape, dtype=float), limit))
            patch = np.array(result["patch_size"])
            if (patch <= limit).all():
                result["median_image_size_in_voxels"] = median_shape
                return result
            divisor = np.prod(np.array(result["architecture"]["arch_kwargs"]["strides"]), axis=0)
            limit = np.where(patch > limit, limit // divisor * divisor, limit)


def _plan(fingerprint: Fingerprint, options: PlanningOptions, where: str) -> Plans:
    """nnU-Net's plans for one fingerprint; no folder or variable is left behind."""
    planner_class = PLANNERS[options.planner]
    # The planner writes its class name into the plans, so the subclass bears the same.
    limited = type(planner_class.__name__, (_FromFingerprint, planner_class), {"options": options})
    log = io.StringIO()
    with tempfile.TemporaryDirectory(prefix="fedcmt-plan-") as folder:
        raw, preprocessed = Path(folder, "raw"), Path(folder, "preprocessed")
        # Named cases keep nnU-Net from searching folders for them.
        named = {"dataset": {"none": {"images": ["none"], "label": "none"}}}
        write_json(raw / _DATASET / "dataset.json", fingerprint.dataset_json() | named)
        write_json(preprocessed / _DATASET / "dataset_fingerprint.json", to_nnunet(fingerprint))
        memory = {} if options.gpu_memory_gb is None else {"gpu_memory_target_in_gb": options.gpu_memory_gb}
        with nnunet_paths(raw, preprocessed), contextlib.redirect_stdout(log):
            planner = limited(_DATASET, **memory)
            planner.UNet_base_num_features = options.base_features
            planner.UNet_max_features_3d = options.max_features
            plans = planner.plan_experiment()
    logger.debug("planner for %s: %s", where, log.getvalue())
    if options.configuration not in plans["configurations"]:
        raise ValueError(
            f"planning: nnU-Net plans no {options.configuration} for {where}, only {sorted(plans['configurations'])}; "
            "choose one of these as planning.configuration"
        )
    if options.normalization == "minmax":
        _normalise_by_range(plans)
    return json.loads(json.dumps(plans))


def _normalise_by_range(plans: Plans) -> None:
    """Min-max inside the foreground mask for all channels of all configurations that do not inherit theirs."""
    for configuration in plans["configurations"].values():
        if "normalization_schemes" in configuration:
            channels = len(configuration["normalization_schemes"])
            configuration["normalization_schemes"] = [MaskedMinMaxNormalization.__name__] * channels
            configuration["use_mask_for_norm"] = [True] * channels


def _plan_alone(fingerprint: Fingerprint, options: PlanningOptions, where: str) -> Plans:
    """What nnU-Net plans for one fingerprint, within the job's limits and with the job's network."""
    plans = _plan(fingerprint, options, where)
    if options.network != PLANNED_NETWORK:  # these halve every axis in every stage, where nnU-Net spares coarse axes
        return _with_common_topology({where: plans}, options)[where]
    chosen = plans["configurations"][options.configuration]
    _limit_stages(chosen["architecture"]["arch_kwargs"], options.max_stages)
    _finish(chosen, options)
    return plans


def _own_plans(fingerprint: Fingerprint, options: PlanningOptions, site: str) -> Plans:
    """Own mode: the trained configuration alone, since the site localises no other from its finer fingerprint."""
    plans = _plan_alone(fingerprint, options, site)
    plans["configurations"] = {options.configuration: plans["configurations"][options.configuration]}
    return plans


def _with_common_topology(plans_by_site: dict[str, Plans], options: PlanningOptions) -> dict[str, Plans]:
    """Kernels of 3 and strides of 2 everywhere, as deep as every site's patch allows."""
    name = options.configuration
    chosen = {site: plans["configurations"][name] for site, plans in plans_by_site.items()}
    limits = {site: _transposed_limit(plans, options) for site, plans in plans_by_site.items()}
    deepest = max((c["architecture"] for c in chosen.values()), key=lambda a: a["arch_kwargs"]["n_stages"])
    stages = _resolutions(deepest["arch_kwargs"]["n_stages"], options)
    while stages > 1 and not all(_fits(c["patch_size"], limits[site], stages) for site, c in chosen.items()):
        stages -= 1
    if stages < 2:
        smallest = {site: c["patch_size"] for site, c in chosen.items() if not _fits(c["patch_size"], limits[site], 2)}
        raise ValueError(
            f"planning: patches {smallest} are too small for a U-Net of two stages; it needs {2 * _MIN_EDGE - 1} "
            "voxels or more on every axis. Leave the site out."
        )
    if options.network == MUNet.__name__:
        _check_equal_channels(chosen)
    dimension = len(next(iter(chosen.values()))["patch_size"])
    architecture = copy.deepcopy(deepest)
    _limit_stages(architecture["arch_kwargs"], stages)
    architecture["arch_kwargs"]["kernel_sizes"] = [[3] * dimension for _ in range(stages)]
    architecture["arch_kwargs"]["strides"] = [[1 if stage == 0 else 2] * dimension for stage in range(stages)]
    for site, configuration in chosen.items():
        configuration["architecture"] = copy.deepcopy(architecture)
        configuration["patch_size"] = [
            _divisible(p, limit, stages) for p, limit in zip(configuration["patch_size"], limits[site], strict=True)
        ]
        _finish(configuration, options)
        plans_by_site[site]["configurations"] = {name: configuration}
    return plans_by_site


def _resolutions(planned: int, options: PlanningOptions) -> int:
    """As many as planned, within the job's limit of stages; `MUNet` has one resolution more than stages."""
    if options.max_stages is None:
        return planned
    return min(planned, options.max_stages + (options.network == MUNet.__name__))


def _check_equal_channels(configurations: Mapping[str, dict[str, Any]]) -> None:
    channels = {site: len(c["normalization_schemes"]) for site, c in configurations.items()}
    if len(set(channels.values())) > 1:
        raise ValueError(
            f"planning: sites have {channels} channels, but MUNet has an encoder for each, so one architecture needs "
            "as many everywhere. Let every dataset.json name all channels, with images of zeros for sequences that are "
            "missing, and set missing_channels in those sites' site.json."
        )


def _transposed_limit(plans: Plans, options: PlanningOptions) -> Sequence[int | None]:
    dimension = len(plans["configurations"][options.configuration]["patch_size"])
    if options.max_patch_size is None:
        return [None] * dimension
    return [options.max_patch_size[axis] for axis in plans["transpose_forward"]][-dimension:]


def _fits(patch: Sequence[int], limits: Sequence[int | None], stages: int) -> bool:
    """Whether the patch, rounded up to be divisible, keeps nnU-Net's smallest feature map on every axis."""
    multiple = 2 ** (stages - 1)
    return all(
        -(-p // multiple) >= _MIN_EDGE and (limit is None or limit // multiple >= _MIN_EDGE)
        for p, limit in zip(patch, limits, strict=True)
    )


def _divisible(length: int, limit: int | None, stages: int) -> int:
    """The nearest multiple of 2^(stages-1), the larger of two; at least 4 voxels in the lowest stage; within the limit.

    Nearest, not next: the batch size and the memory were planned for the local patch.
    """
    multiple = 2 ** (stages - 1)
    edge = max(_MIN_EDGE, (2 * length + multiple) // (2 * multiple))
    return multiple * (edge if limit is None else min(edge, limit // multiple))


def _limit_stages(arch_kwargs: dict[str, Any], stages: int | None) -> None:
    """Keep the first stages; the lowest then has kernels of 3 on all axes, as nnU-Net's always has."""
    if stages is None or stages >= arch_kwargs["n_stages"]:
        return
    arch_kwargs["n_stages"] = stages
    for field in ("features_per_stage", "kernel_sizes", "strides", _convolutions(arch_kwargs)):
        arch_kwargs[field] = arch_kwargs[field][:stages]
    arch_kwargs["n_conv_per_stage_decoder"] = arch_kwargs["n_conv_per_stage_decoder"][: stages - 1]
    arch_kwargs["kernel_sizes"][-1] = [3] * len(arch_kwargs["kernel_sizes"][-1])


def _finish(configuration: dict[str, Any], options: PlanningOptions) -> None:
    if options.batch_size is not None:
        configuration["batch_size"] = options.batch_size
    if options.extra_stem_convolution:
        arch_kwargs = configuration["architecture"]["arch_kwargs"]
        arch_kwargs[_convolutions(arch_kwargs)][0] += 1
    if options.adapter == "linear":
        configuration["architecture"]["network_class_name"] = _path(LinearAdapterUNet)
    if options.network != PLANNED_NETWORK:
        configuration["architecture"] = _own_architecture(options, configuration["architecture"]["arch_kwargs"])


def _own_architecture(options: PlanningOptions, planned: Mapping[str, Any]) -> dict[str, Any]:
    """The plans' entry for a network that nnU-Net lacks, as deep and as wide as the one planned."""
    arguments = _ARGUMENTS.get(options.network, _unet_arguments)
    return {
        "network_class_name": _path(NETWORKS[options.network]),
        "arch_kwargs": {**arguments(planned), **options.network_options},
        "_kw_requires_import": [],
    }


def _unet_arguments(planned: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "n_stages": planned["n_stages"],
        "features_per_stage": planned["features_per_stage"],
        "deep_supervision": False,  # tells whoever trains these plans that there is one output
    }


def _munet_arguments(planned: Mapping[str, Any]) -> dict[str, Any]:
    """The planned first stage becomes the stems; `MUNet` counts stages from half resolution down."""
    stages, dimensions = planned["n_stages"] - 1, len(planned["strides"][0])
    return {
        "n_stages": stages,
        "stem_features": planned["features_per_stage"][0],
        "features_per_stage": planned["features_per_stage"][1:],
        "dimensions": dimensions,
        "strides": planned_strides(stages, dimensions),
    }


def _fedmepd_arguments(planned: Mapping[str, Any]) -> dict[str, Any]:
    """Of a network for any channels; `with_sequences` makes it a site's."""
    stages = planned["n_stages"]
    return {**_unet_arguments(planned), "heads": [HEADS[min(level, len(HEADS) - 1)] for level in range(stages)]}


_ARGUMENTS = {MUNet.__name__: _munet_arguments, FedMEPDNet.__name__: _fedmepd_arguments}
"""Network to how its arguments follow from what nnU-Net planned, where that is not `_unet_arguments`."""


def _path(network: type) -> str:
    return f"{network.__module__}.{network.__qualname__}"


def _architecture_fields(plans: Plans) -> dict[str, str]:
    """Everything that decides the networks, as JSON, so that a list and a tuple are the same."""
    return {
        f"{name}.{field}": json.dumps(value, sort_keys=True)
        for name, configuration in plans["configurations"].items()
        if "architecture" in configuration
        for field, value in {
            "network_class_name": configuration["architecture"]["network_class_name"],
            **configuration["architecture"]["arch_kwargs"],
        }.items()
    }


def _convolutions(arch_kwargs: Mapping[str, Any]) -> str:
    return "n_conv_per_stage" if "n_conv_per_stage" in arch_kwargs else "n_blocks_per_stage"


def _use_own_spacing(plans: Plans, local: Mapping[str, Any]) -> None:
    """Replace the 3d_fullres target spacing by nnU-Net's rule on the site's own fingerprint, in the plans' axis order.

    Plans made from wide bins would resample every image a little, for nothing.
    """
    rule = SimpleNamespace(
        dataset_fingerprint=local, overwrite_target_spacing=None, anisotropy_threshold=ANISO_THRESHOLD
    )
    spacing = ExperimentPlanner.determine_fullres_target_spacing(rule)[plans["transpose_forward"]]
    for name, configuration in plans["configurations"].items():
        if name in ("2d", "3d_fullres"):
            configuration["spacing"] = [float(s) for s in spacing][-len(configuration["patch_size"]) :]


def _check_channels(configuration: Mapping[str, Any], plans: Plans, channels: Sequence[str], *, where: str) -> None:
    lists = {field: len(configuration[field]) for field in ("normalization_schemes", "use_mask_for_norm")}
    lists["foreground_intensity_properties_per_channel"] = len(plans["foreground_intensity_properties_per_channel"])
    wrong = {field: count for field, count in lists.items() if count != len(channels)}
    if wrong:
        raise ValueError(
            f"{where}: entries per channel are {wrong}, but dataset.json names {len(channels)} channels "
            f"{list(channels)}. The plans are for other data; plan again."
        )


def _data_identifier(plans: Plans, configuration: Mapping[str, Any], dataset_json: Mapping[str, Any]) -> str:
    used = (
        *("spacing", "normalization_schemes", "use_mask_for_norm", "preprocessor_name"),
        *("resampling_fn_data", "resampling_fn_data_kwargs", "resampling_fn_seg", "resampling_fn_seg_kwargs"),
    )
    properties = plans["foreground_intensity_properties_per_channel"]
    content = {
        **{field: configuration[field] for field in used},
        "transpose_forward": plans["transpose_forward"],
        "image_reader_writer": plans["image_reader_writer"],
        # Schemes that normalise each image by itself do not depend on the data set; one we do not know might.
        "intensities": {
            str(i): properties[str(i)]
            for i, scheme in enumerate(configuration["normalization_schemes"])
            if scheme not in _WITHOUT_INTENSITIES
        },
        # nnU-Net stores where each class lies with the images.
        "labels": list(dataset_json["labels"].items()),
        "regions_class_order": dataset_json.get("regions_class_order"),
    }
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return f"fedcmt_{digest[:10]}"
