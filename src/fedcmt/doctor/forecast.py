"""What a job will cost a site: bytes on the wire and on disk, memory and time, from its own plans and network.

Bytes follow from names and shapes and are exact for these plans. Memory follows from the tensors that a step keeps for
its gradient, counted without allocating any. Time needs `fedcmt.doctor.measurement`.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fedcmt.config import OptimizerConfig
from fedcmt.doctor.findings import Finding, ok, readable_bytes, readable_seconds
from fedcmt.doctor.images import CaseFacts
from fedcmt.doctor.job import JobSite, SitePlan, network_without_memory
from fedcmt.doctor.measurement import TIMED_STEPS, Measurement
from fedcmt.models.scopes import Partition
from fedcmt.nnunet.network import input_parameters
from fedcmt.params import named_tensors, serialized_size, shapes

_FLOAT_BYTES = 4
_FIXED_BYTES = 150_000_000
"""Loader, libraries and allocator beside a step's tensors, as measured on CPUs."""


@dataclass(frozen=True)
class Forecast:
    """A site's share of a job.

    Attributes:
      network: Its class name.
      parameters: Numbers in the network.
      parameters_by_scope: Scope to numbers.
      batch_shape: [B, C, *patch] of a step.
      rounds: Of the job.
      local_steps: Per round.
      received_bytes: Of tensors, per round.
      sent_bytes: Of tensors, per round.
      total_received_bytes: Over the job.
      total_sent_bytes: Over the job.
      preprocessed_bytes: Of all training cases: compressed like the measured one, or not compressed without one.
      state_bytes: The site's last and best model and optimiser, in the workspace.
      results_bytes: The exported model folder.
      memory_bytes: Of training, beside what the process takes before it: counted, or measured where that is more.
      seconds_per_round: Steps and validation; None without a measurement.
      seconds: Preprocessing and all rounds; None without a measurement.
      measurement: What was measured; None if nothing was.
      assumptions: What the numbers rest on, and what they leave out.
    """

    network: str
    parameters: int
    parameters_by_scope: dict[str, int]
    batch_shape: tuple[int, ...]
    rounds: int
    local_steps: int
    received_bytes: int
    sent_bytes: int
    total_received_bytes: int
    total_sent_bytes: int
    preprocessed_bytes: int
    state_bytes: int
    results_bytes: int
    memory_bytes: int
    seconds_per_round: float | None
    seconds: float | None
    measurement: Measurement | None
    assumptions: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)

    def disk_needs(self) -> dict[str, int]:
        """Bytes of new files in each folder."""
        return {
            "nnUNet_preprocessed": self.preprocessed_bytes,
            "nnUNet_results": self.results_bytes,
            "workspace": self.state_bytes,
        }

    def findings(self) -> list[Finding]:
        """As lines of a report."""
        scopes = ", ".join(f"{scope} {count:,}" for scope, count in self.parameters_by_scope.items())
        shape = " x ".join(map(str, self.batch_shape))
        per_round = f"{readable_bytes(self.received_bytes)} in and {readable_bytes(self.sent_bytes)} out per round"
        total = f"{readable_bytes(self.total_received_bytes)} and {readable_bytes(self.total_sent_bytes)}"
        parts = ((self.preprocessed_bytes, "preprocessed"), (self.state_bytes, "state"), (self.results_bytes, "model"))
        space = ", ".join(f"{readable_bytes(size)} {what}" for size, what in parts)
        return [
            ok("network", f"{self.network}, {self.parameters:,} parameters ({scopes}), steps of {shape}"),
            ok("traffic", f"{per_round}, {total} in {self.rounds} rounds"),
            ok("space", space),
            ok("training", f"about {readable_bytes(self.memory_bytes)} beside the process itself"),
            ok("time", self._time()),
        ]

    def _time(self) -> str:
        measured = self.measurement
        if measured is None or self.seconds is None or self.seconds_per_round is None:
            return "not measured"
        step, loading = readable_seconds(measured.step_seconds), readable_seconds(measured.loading_seconds)
        where = measured.device if measured.device != "cpu" else f"CPU, {measured.threads} threads"
        return (
            f"{readable_seconds(self.seconds)} in all, {readable_seconds(self.seconds_per_round)} per round of "
            f"{self.local_steps} steps ({where}: {step} per step, {loading} of it loading)"
        )


def forecast_bytes(asked: JobSite, plan: SitePlan, facts: Sequence[CaseFacts], device: torch.device) -> Forecast:
    """All of a forecast but time."""
    network = network_without_memory(plan)
    tensors = named_tensors(network)
    partition = Partition(
        asked.algorithm.scopes,
        shapes(tensors),
        modality=asked.config.modality,
        channels=plan.channels,
        input_parameters=input_parameters(network),
    )
    by_scope: Counter[str] = Counter()
    for name, scope in partition.scopes.items():
        by_scope[scope.value] += tensors[name].numel()
    wire = {name: torch.empty(shape, device="meta") for name, shape in partition.wire_shapes.items()}
    message = serialized_size(wire)[1] if wire else 0
    rounds = asked.job.server.num_rounds
    numbers = sum(tensor.numel() for tensor in tensors.values())
    moments = _moments(asked.config.optimizer)
    return Forecast(
        network=type(network).__name__,
        parameters=numbers,
        parameters_by_scope=dict(sorted(by_scope.items())),
        batch_shape=plan.input_shape,
        rounds=rounds,
        local_steps=asked.config.local_steps,
        received_bytes=message,
        sent_bytes=message,
        total_received_bytes=message * (rounds + (asked.algorithm.product == "received")),
        total_sent_bytes=message * rounds,
        preprocessed_bytes=preprocessed_bytes(plan, facts),
        state_bytes=_FLOAT_BYTES * numbers * (2 + moments),
        results_bytes=_FLOAT_BYTES * numbers * 2,
        memory_bytes=_FLOAT_BYTES * numbers * (2 + moments) + _step_bytes(network, plan, device),
        seconds_per_round=None,
        seconds=None,
        measurement=None,
        assumptions=_assumptions(asked),
    )


def preprocessed_bytes(plan: SitePlan, facts: Sequence[CaseFacts]) -> int:
    """Of all training cases resampled to the plans' spacing, float32 images and int8 labels, not compressed.

    Cropping to the part that is not 0 makes it less.
    """
    per_voxel = _FLOAT_BYTES * len(plan.channels) + 1
    return per_voxel * sum(resampled_voxels(plan, case) for case in facts if case.training)


def resampled_voxels(plan: SitePlan, case: CaseFacts) -> int:
    """Voxels of a case on the plans' spacing; a 2D configuration keeps the case's slices."""
    order = plan.plans["transpose_forward"]
    size_zyx, spacing_zyx = case.size_vox[::-1], case.spacing_mm[::-1]
    target = list(plan.chosen["spacing"])
    axes = order[len(order) - len(target) :]
    voxels = math.prod(size_zyx[axis] for axis in order if axis not in axes)
    for axis, spacing in zip(axes, target, strict=True):
        voxels *= max(1, round(size_zyx[axis] * spacing_zyx[axis] / spacing))
    return voxels


def _step_bytes(network: nn.Module, plan: SitePlan, device: torch.device) -> int:
    """What a step keeps for its gradient, twice its largest tensor for what the backward pass makes, and the loss's."""
    batch = torch.empty(plan.input_shape, device="meta")
    kept, outputs = tensors_kept(network, batch)
    half = 2 if device.type == "cuda" else 1  # mixed precision
    tensors = (sum(kept) + 2 * max(kept, default=0)) // half + 4 * outputs + batch.numel() * _FLOAT_BYTES
    return tensors + _FIXED_BYTES


def tensors_kept(network: nn.Module, batch: Tensor) -> tuple[list[int], int]:
    """Bytes of each tensor that a forward pass on the meta device keeps for the backward pass, and of the outputs.

    Args:
      network: On the meta device; its parameters are not counted.
      batch: Its input, on the meta device.
    """
    own = {parameter.untyped_storage()._cdata for parameter in network.parameters()}
    storages: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            storages[storage._cdata] = storage  # held, so that its address is not given to another
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = network(batch)
    levels = output if isinstance(output, list | tuple) else [output]
    sizes = [level.numel() * level.element_size() for level in levels if isinstance(level, Tensor)]
    return [storage.nbytes() for storage in storages.values()], sum(sizes)


def _moments(optimizer: OptimizerConfig) -> int:
    """Numbers that the optimiser remembers for each parameter."""
    return 2 if optimizer.name != "SGD" else int(optimizer.momentum > 0)


def _assumptions(asked: JobSite) -> tuple[str, ...]:
    notes = ["plans are those of this site alone; with the other sites, depth, patch and batch may differ"]
    algorithm = asked.algorithm
    if algorithm.sends_extras:
        notes.append("further tensors that this algorithm sends, and rows it leaves out, are not counted")
    rounds = range(asked.job.server.num_rounds)
    if any(algorithm.needs_teacher(round_idx, len(rounds)) for round_idx in rounds):
        notes.append("rounds with distillation take one more forward pass per step, and a second copy of the network")
    if asked.job.server.privacy.mode == "instance_dp":
        notes.append("gradients of single cases (instance_dp) take more memory and time than this")
    if asked.job.server.contribution.tier or asked.job.server.cross_site:
        notes.append("models of other sites, which this job asks to be scored, come on top")
    return (*notes, "waiting for other sites, transfer, tests on whole cases and export are not in the time")


def with_measurement(
    forecast: Forecast, measured: Measurement, asked: JobSite, plan: SitePlan, facts: Sequence[CaseFacts]
) -> Forecast:
    """The forecast with time, and with disk space and memory as they were measured."""
    training = {case.case: resampled_voxels(plan, case) for case in facts if case.training}
    cases_like_it = sum(training.values()) / training[f"imagesTr/{measured.case}"]
    # On a GPU loader processes work beside the steps, unless the site says otherwise.
    beside = measured.device == "cuda" and asked.config.num_workers != 0
    step = max(measured.step_seconds - measured.loading_seconds, 0.0) if beside else measured.step_seconds
    steps = step * forecast.rounds * forecast.local_steps
    rounds = steps + measured.validation_seconds * validation_batches(asked)
    preparing = measured.preprocess_seconds * cases_like_it / asked.config.num_processes
    how = "loaders are taken to keep up" if beside else "loading is in the steps' own process"
    return replace(
        forecast,
        preprocessed_bytes=round(measured.preprocessed_bytes * cases_like_it),
        memory_bytes=max(forecast.memory_bytes, measured.memory_bytes),
        seconds_per_round=rounds / forecast.rounds,
        seconds=preparing + rounds,
        measurement=measured,
        assumptions=(
            f"time is of {TIMED_STEPS} steps on case {measured.case} with the machine as busy as it is now; {how}",
            *forecast.assumptions,
        ),
    )


def validation_batches(asked: JobSite) -> int:
    """Batches that a site validates in the job, before and after the steps of each round that has a validation."""
    every, rounds = asked.config.val_every, asked.job.server.num_rounds
    with_one = len({*range(0, rounds, every), rounds - 1})
    return 2 * asked.config.val_batches * with_one
