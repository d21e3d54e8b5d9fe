"""Whether the parts of a job work together, looked at before data are made or anything is asked of a site."""

import inspect
from collections.abc import Mapping
from typing import Any

from fedcmt.algorithms.base import Algorithm
from fedcmt.algorithms.fedmepd import FUSION, FedMEPD
from fedcmt.config import ConfigError, JobConfig, build_algorithm
from fedcmt.federation import check_scoring
from fedcmt.models.fedmepd import FedMEPDNet
from fedcmt.models.scopes import ALL_PERSONAL
from fedcmt.privacy.server_half import check_algorithm


def check_job(job: JobConfig) -> Algorithm:
    """Build and return the algorithm and read the planning options once, so that a mistake in a job folder shows.

    Raises:
      ConfigError: As `check_planning`, or if a job of FedMEPD has not exactly one fusion site.
      FederationError: If the job asks for scores that cannot be had.
      ValueError: If the algorithm would break the job's privacy.
    """
    algorithm = build_algorithm(job.algorithm)
    check_planning(algorithm, job.server.planning, job=job.name)
    check_scoring(algorithm, job.server, job.sites)
    check_algorithm(job.server.privacy, algorithm)
    if isinstance(algorithm, FedMEPD):
        _check_one_fusion_site(job)
    return algorithm


def check_planning(algorithm: Algorithm, planning: Mapping[str, Any], *, job: str) -> None:
    """What the server's part of a job says by itself: a job that was submitted by hand has met no launcher.

    Args:
      algorithm: The job's.
      planning: Keys of `fedcmt.nnunet.planning_options.PlanningOptions`.
      job: Its name, for errors.

    Raises:
      ConfigError: If sites keep plans of their own and the algorithm cannot average networks that differ, or the
        network needs anchors and the algorithm brings none, or another number.
    """
    # nnU-Net takes seconds to import: only once all else is well.
    from fedcmt.nnunet.planning_options import PlanningOptions

    options = PlanningOptions.from_dict(planning)
    if options.mode == "own" and not (algorithm.scopes.by_shape or algorithm.scopes == ALL_PERSONAL):
        raise ConfigError(
            f"job {job!r}: planning.mode is 'own', so sites' networks differ in shapes, and "
            f"{type(algorithm).__name__} averages tensors by name alone. Use mode 'architecture' or 'consensus', or an "
            "algorithm whose scopes are by_shape, such as fedcmt.algorithms.asymmetric.AsymmetricFedAvg"
        )
    if options.network == FedMEPDNet.__name__ and options.network_options.get("calibrated", True):
        _check_anchors(algorithm, options.network_options, job)


def _check_one_fusion_site(job: JobConfig) -> None:
    """The algorithm checks it too, but only once every site has read its data."""
    found = [name for name, site in job.sites.items() if site.role == FUSION]
    if len(found) != 1:
        raise ConfigError(
            f"job {job.name!r}: sites {found} of {list(job.sites)} have the role {FUSION!r}, FedMEPD needs exactly "
            "one, with all sequences. Set role in the sites' site.json"
        )


def _check_anchors(algorithm: Algorithm, network_options: Mapping[str, Any], job: str) -> None:
    """Raise `ConfigError` unless the algorithm brings as many anchors as a calibrated network has."""
    if not (isinstance(algorithm, FedMEPD) and algorithm.anchors):
        raise ConfigError(
            f"job {job!r}: planning.network is FedMEPDNet, whose features are calibrated by anchors, and "
            f"{type(algorithm).__name__} brings none. Set planning.network_options.calibrated to false"
        )
    key = "anchors_per_class"
    expected = network_options.get(key, inspect.signature(FedMEPDNet).parameters[key].default)
    if algorithm.anchors_per_class != expected:
        raise ConfigError(
            f"job {job!r}: algorithm.{key} is {algorithm.anchors_per_class} and server.planning.network_options.{key} "
            f"{expected}, expected the same number. Set both"
        )
