"""A site's data on the way into training: its own fingerprint, and its preprocessed cases once plans are there."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fedcmt.data.checks import read_dataset_json
from fedcmt.nnunet.fingerprint import Fingerprint, bin_policy, extract_fingerprint, to_nnunet
from fedcmt.nnunet.planning_options import PlanningOptions
from fedcmt.nnunet.plans import localise_plans
from fedcmt.nnunet.preprocess import install_plans, preprocess_dataset


def own_fingerprint(dataset: Path, options: PlanningOptions) -> Fingerprint:
    """The site's fingerprint in its finest form, for the site itself; send it ``coarsened`` to the job's planning
    mode."""
    exact = bin_policy("consensus")
    return extract_fingerprint(
        dataset,
        samples_per_case=options.samples_per_case,
        spacing_step_mm=exact.spacing_step_mm,
        shape_step_vox=exact.shape_step_vox,
        crop_bins=exact.crop_bins,
        min_cases=options.min_cases,
    )


def prepare_data(
    received: Mapping[str, Any],
    fingerprint: Fingerprint,
    dataset: Path,
    preprocessed: Path,
    options: PlanningOptions,
    *,
    site: str,
    role: str = "site",
    job: str,
    num_processes: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Make received plans the site's own, install them, and preprocess what they ask for unless that was done before.

    Args:
      received: Plans from the server.
      fingerprint: The site's own, in its finest form.
      dataset: The data set in nnU-Net raw form.
      preprocessed: What nnU-Net calls ``nnUNet_preprocessed``.
      options: The job's planning options.
      site: The site's name.
      role: "site" or "fusion".
      job: The job's name; with the site's it names the plans.
      num_processes: Processes that preprocess.
      progress: Told after each case.

    Returns:
      The localised plans.
    """
    local = to_nnunet(fingerprint)
    plans = localise_plans(
        dict(received),
        site=site,
        role=role,
        job=job,
        dataset_name=dataset.name,
        dataset_json=read_dataset_json(dataset),
        mode=options.mode,
        local=None if options.mode == "consensus" else local,
    )
    install_plans(plans, dataset, preprocessed, local)
    preprocess_dataset(
        plans, options.configuration, dataset, preprocessed, num_processes=num_processes, progress=progress
    )
    return plans
