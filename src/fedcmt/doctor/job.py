"""A job as one site meets it: its settings, and the plans and network it would get if it were the only site."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fedcmt.algorithms.base import Algorithm
from fedcmt.config import ConfigError, JobConfig, SiteConfig, build_algorithm
from fedcmt.data.checks import channel_names, read_dataset_json
from fedcmt.data.classes import CaseClasses, read_classes
from fedcmt.job_folder import Override, apply_overrides, stage
from fedcmt.nnunet.fingerprint import Fingerprint, bin_policy, to_nnunet
from fedcmt.nnunet.network import build_network
from fedcmt.nnunet.planning_options import PlanningOptions
from fedcmt.nnunet.plans import localise_plans, plan_federation
from fedcmt.nnunet.site_data import own_fingerprint


@dataclass(frozen=True)
class JobSite:
    """What a job asks of one site.

    Attributes:
      job: The whole job.
      name: The site's name.
      config: The site's.
      planning: The job's.
      algorithm: The job's.
    """

    job: JobConfig
    name: str
    config: SiteConfig
    planning: PlanningOptions
    algorithm: Algorithm


@dataclass(frozen=True)
class SitePlan:
    """A site's data set with the plans for it.

    Attributes:
      dataset: In nnU-Net raw form.
      dataset_json: Its dataset.json.
      fingerprint: In its finest form.
      plans: Localised.
      configuration: E.g. "3d_fullres".
      classes: Of a site that classifies; None for one that segments.
    """

    dataset: Path
    dataset_json: dict[str, Any]
    fingerprint: Fingerprint
    plans: dict[str, Any]
    configuration: str
    classes: CaseClasses | None

    @property
    def channels(self) -> tuple[str, ...]:
        """Channel names in nnU-Net's order."""
        return channel_names(self.dataset_json)

    @property
    def chosen(self) -> dict[str, Any]:
        """The plans' entry for the configuration that is trained."""
        return self.plans["configurations"][self.configuration]

    @property
    def input_shape(self) -> tuple[int, ...]:
        """[B, C, *patch] of a training step."""
        return (self.chosen["batch_size"], len(self.channels), *self.chosen["patch_size"])


def read_job(folder: Path, site: str, overrides: Sequence[Override] = ()) -> JobSite:
    """A job folder with overrides applied, for one of its sites.

    Raises:
      ConfigError, ValueError: If the job cannot be used or has no such site.
    """
    if not (folder / "meta.json").is_file():
        raise ConfigError(f"{folder}: no meta.json there; give a job folder such as jobs/brats_sdl")
    with tempfile.TemporaryDirectory() as temporary:
        staged = Path(temporary) / folder.name
        stage(folder, staged)
        apply_overrides(staged, overrides)
        job = JobConfig.from_folder(staged)
    if site not in job.sites:
        raise ConfigError(f"{folder}: no site {site!r}; its sites are {sorted(job.sites)}")
    planning = PlanningOptions.from_dict(job.server.planning)
    return JobSite(job, site, job.sites[site], planning, build_algorithm(job.algorithm))


def plan_alone(asked: JobSite, dataset: Path) -> SitePlan:
    """Plans as the server would make them with this site alone.

    In the federation other sites' fingerprints may change depth, patch and, in consensus mode, everything.

    Raises:
      DatasetError, ValueError: If the data set does not allow it.
    """
    options, config = asked.planning, asked.config
    dataset_json = read_dataset_json(dataset)
    fingerprint = own_fingerprint(dataset, options)
    received = plan_federation({asked.name: fingerprint.coarsened(bin_policy(options.mode))}, options)[asked.name]
    plans = localise_plans(
        received,
        site=asked.name,
        role=config.role,
        job=asked.job.name,
        dataset_name=dataset.name,
        dataset_json=dataset_json,
        mode=options.mode,
        local=None if options.mode == "consensus" else to_nnunet(fingerprint),
    )
    classes = read_classes(dataset, dataset_json, config.classes) if config.task == "classification" else None
    return SitePlan(dataset, dataset_json, fingerprint, plans, options.configuration, classes)


def network_without_memory(plan: SitePlan) -> nn.Module:
    """The site's network on torch's meta device: names, shapes and what a step does, but no values."""
    labels = plan.dataset_json
    if plan.classes is not None:  # one output map per class instead of per label
        labels = {"labels": {name: index for index, name in enumerate(("background", *plan.classes.names[1:]))}}
    with torch.device("meta"):
        return build_network(plan.plans, plan.configuration, len(plan.channels), labels)
