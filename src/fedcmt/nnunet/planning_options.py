"""What a job may say about planning."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
from nnunetv2.experiment_planning.experiment_planners.residual_unets.residual_encoder_unet_planners import (
    nnUNetPlannerResEncL,
    nnUNetPlannerResEncM,
    nnUNetPlannerResEncXL,
)
from torch import nn

from fedcmt.models.cross_modality import CMM_NORMS
from fedcmt.models.fedmepd import FedMEPDNet
from fedcmt.models.munet import MUNet
from fedcmt.models.trans_unet3d import TransUNet3D
from fedcmt.models.unet3d import UNet3D
from fedcmt.nnunet.fingerprint import bin_policy
from fedcmt.settings import is_number

PLANNERS: dict[str, type[ExperimentPlanner]] = {
    "ExperimentPlanner": ExperimentPlanner,
    "nnUNetPlannerResEncM": nnUNetPlannerResEncM,
    "nnUNetPlannerResEncL": nnUNetPlannerResEncL,
    "nnUNetPlannerResEncXL": nnUNetPlannerResEncXL,
}
"""nnU-Net's planners by the name jobs use."""

NETWORKS: dict[str, type[nn.Module]] = {
    "UNet3D": UNet3D,
    "TransUNet3D": TransUNet3D,
    "MUNet": MUNet,
    "FedMEPDNet": FedMEPDNet,
}
"""Networks that nnU-Net lacks, by the name jobs use."""

NETWORK_OPTIONS: dict[str, dict[str, tuple[Any, ...]]] = {
    "MUNet": {"norm": ("instance", "group"), "cmm_norm": CMM_NORMS, "strict_compat": (False, True)},
    "FedMEPDNet": {
        "calibrated": (True, False),
        "calibration": ("replace", "add"),
        "anchors_per_class": tuple(range(1, 17)),
        "attention_dropout": (0.0, 0.1),
        "padding_mode": ("zeros", "reflect"),
    },
}
"""What ``network_options`` may say of a network, and the values; of the others, nothing."""

PLANNED_NETWORK = "plan"
CONFIGURATIONS = ("2d", "3d_fullres", "3d_lowres")
ADAPTERS = ("conv", "linear")
NORMALIZATIONS = ("plan", "minmax")


@dataclass(frozen=True)
class PlanningOptions:
    """What a job may say about planning; the defaults are nnU-Net's.

    Attributes:
      mode: "consensus" (one data set split over sites), "architecture" (different data, one topology) or "own"
        (different data, every site planned alone within the limits below, so that networks differ in shapes and in
        depth; for algorithms whose `fedcmt.models.scopes.ScopeRules` are ``by_shape``).
      planner: A name in `PLANNERS`.
      configuration: The configuration that is trained, one of `CONFIGURATIONS`.
      network: "plan", the planner's own, or a name in `NETWORKS`, which takes the planner's patch, depth and features,
        has kernels of 3 and halves every axis in every stage. Those need the ExperimentPlanner, and all but MUNet a 3D
        configuration. ``base_features`` 16 and ``max_stages`` 5 give UNet3D 16 to 256, and MUNet in "2d" the 16 and 32
        to 512 it was published with. nnU-Net plans batch and patch for its own U-Net; MUNet with four channels keeps
        over twice as many values for the gradient, so set ``batch_size`` for it.
      network_options: Arguments of the network, see `NETWORK_OPTIONS` and the network's class.
      normalization: "plan", nnU-Net's by the names of the channels, or "minmax", every channel to [0, 1], see
        `MaskedMinMaxNormalization`: preprocessed and predicted by this project, not by stock commands.
      base_features: Features of the first stage; they double per stage.
      max_features: Most features of a 3D stage (2D configurations keep nnU-Net's 512).
      gpu_memory_gb: GPU memory to plan for in GB; None for the planner's own.
      max_patch_size: Largest patch of the trained configuration in voxels, never exceeded, in array axis order (z, y, x
        as nnU-Net reads images); None for the planner's.
      batch_size: Patches per step; None for the planner's.
      max_stages: Most stages of the trained configuration's network; None for the planner's. A stage is a resolution,
        but for MUNet, which has one resolution more than stages.
      extra_stem_convolution: One more convolution in PlainConvUNet's first stage, so that its first block can be a
        site's modality adapter and the shared encoder starts behind it.
      adapter: First block of the trained configuration: "conv", the planned network's own, or "linear", a 1x1x1
        convolution as in FedCMT's published code (see `LinearAdapterUNet`; it cannot learn from one input channel).
        "linear" needs the ExperimentPlanner, a 3D configuration and ``extra_stem_convolution``.
      samples_per_case: Foreground voxels a site draws per case for its fingerprint.
      min_cases: Fewest training cases a site sends statistics of.
    """

    mode: str = "consensus"
    planner: str = "ExperimentPlanner"
    configuration: str = "3d_fullres"
    network: str = PLANNED_NETWORK
    network_options: Mapping[str, Any] = field(default_factory=dict)
    normalization: str = "plan"
    base_features: int = 32
    max_features: int = 320
    gpu_memory_gb: float | None = None
    max_patch_size: tuple[int, int, int] | None = None
    batch_size: int | None = None
    max_stages: int | None = None
    extra_stem_convolution: bool = False
    adapter: str = "conv"
    samples_per_case: int = 10_000
    min_cases: int = 5

    def __post_init__(self) -> None:
        bin_policy(self.mode)
        _check_choice("planner", self.planner, tuple(PLANNERS))
        _check_choice("configuration", self.configuration, CONFIGURATIONS)
        _check_choice("network", self.network, (PLANNED_NETWORK, *NETWORKS))
        _check_choice("adapter", self.adapter, ADAPTERS)
        _check_choice("normalization", self.normalization, NORMALIZATIONS)
        for name, least in _SMALLEST.items():
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
                raise ValueError(f"planning.{name} is {value!r}, expected an integer of at least {least}")
        memory = self.gpu_memory_gb
        if memory is not None and not (is_number(memory) and memory > 0):
            raise ValueError(f"planning.gpu_memory_gb is {self.gpu_memory_gb!r}, expected a positive number of GB")
        if not isinstance(self.extra_stem_convolution, bool):
            raise ValueError(
                f"planning.extra_stem_convolution is {self.extra_stem_convolution!r}, expected true or false"
            )
        patch = self.max_patch_size
        if patch is not None and (
            not isinstance(patch, tuple)
            or len(patch) != 3
            or any(isinstance(p, bool) or not isinstance(p, int) or p < 8 for p in patch)
        ):
            raise ValueError(
                f"planning.max_patch_size is {patch!r}, expected three integers of at least 8 voxels (z, y, x)"
            )
        if self.extra_stem_convolution and self.planner != "ExperimentPlanner":
            raise ValueError(
                f"planning.extra_stem_convolution is for PlainConvUNet; {self.planner} plans a residual encoder, whose "
                "stem is already separate. Leave it out."
            )
        if self.network != PLANNED_NETWORK:
            self._check_own_network()
        self._check_network_options()
        if self.adapter == "linear":
            self._check_linear_adapter()

    def _check_own_network(self) -> None:
        where = f"planning.network is {self.network!r}"
        if self.planner != "ExperimentPlanner":
            raise ValueError(
                f"{where}, but {self.planner} plans patches and batches for a residual encoder. Use ExperimentPlanner."
            )
        if self.configuration == "2d" and self.network != "MUNet":
            raise ValueError(f"{where}, a 3D network, but planning.configuration is '2d'. Use a 3D configuration.")
        if self.extra_stem_convolution or self.adapter != "conv":
            raise ValueError(
                f"{where}, which has further convolutions behind its first ones already. Leave "
                "planning.extra_stem_convolution and planning.adapter out."
            )

    def _check_network_options(self) -> None:
        if not isinstance(self.network_options, Mapping):
            raise ValueError(f"planning.network_options is {self.network_options!r}, expected an object")
        known = NETWORK_OPTIONS.get(self.network, {})
        unknown = sorted(set(self.network_options) - set(known))
        if unknown:
            raise ValueError(
                f"planning.network_options: network {self.network!r} takes no {unknown}, only {list(known)}."
            )
        if self.network_options.get("norm") == "batch":
            raise ValueError(
                "planning.network_options.norm is 'batch', whose running statistics are no parameters: sites exchange "
                "and export parameters alone. Use 'instance' or 'group'."
            )
        for name, value in self.network_options.items():
            _check_choice(f"network_options.{name}", value, known[name])

    def _check_linear_adapter(self) -> None:
        where = "planning.adapter is 'linear', a first block for 3D PlainConvUNets"
        if self.planner != "ExperimentPlanner":
            raise ValueError(f"{where}, but {self.planner} plans a residual encoder. Use 'conv' or ExperimentPlanner.")
        if self.configuration == "2d":
            raise ValueError(f"{where}, but planning.configuration is '2d'. Use 'conv' or a 3D configuration.")
        if not self.extra_stem_convolution:
            raise ValueError(
                f"{where} with the shared encoder behind it, but planning.extra_stem_convolution is false. Set it to "
                "true."
            )

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "PlanningOptions":
        """Options from a job's JSON.

        Raises:
          ValueError: If a key is unknown or a value is out of range.
        """
        known = [field.name for field in fields(cls)]
        unknown = sorted(set(content) - set(known))
        if unknown:
            raise ValueError(f"planning: unknown options {unknown}; known ones are {known}")
        values = dict(content)
        if isinstance(values.get("max_patch_size"), list):
            values["max_patch_size"] = tuple(values["max_patch_size"])
        return cls(**values)


_SMALLEST = {
    "base_features": 1,
    "max_features": 1,
    "batch_size": 1,
    "max_stages": 2,
    "samples_per_case": 1,
    "min_cases": 1,
}


def _check_choice(name: str, value: object, known: Sequence[object]) -> None:
    if value not in known:
        raise ValueError(f"planning.{name} is {value!r}, expected one of {list(known)}")
