"""All checks in their order: what is looked at depends on what is named and on what is sound so far."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch

from fedcmt.config import SiteConfig
from fedcmt.data.checks import (
    READ_ERRORS,
    DatasetError,
    channel_names,
    check_dataset,
    check_splits,
    find_dataset,
    find_splits,
    read_dataset_json,
)
from fedcmt.data.classes import read_classes
from fedcmt.doctor.findings import Finding, Level, ok, problem, readable_bytes, warning
from fedcmt.doctor.forecast import Forecast, forecast_bytes, with_measurement
from fedcmt.doctor.images import CaseFacts, across_cases, read_facts
from fedcmt.doctor.job import JobSite, plan_alone, read_job
from fedcmt.doctor.machine import (
    disk_findings,
    folder_findings,
    gpu_findings,
    machine_findings,
    memory_findings,
    server_finding,
    workspace_needs,
)
from fedcmt.doctor.measurement import a_case, measure
from fedcmt.evaluation.metrics import EvaluationError
from fedcmt.evaluation.regions import with_score_regions
from fedcmt.job_folder import Override
from fedcmt.whole_cases import site_device
from fedcmt.workspace import nnunet_folder


@dataclass(frozen=True)
class Request:
    """What is to be looked at.

    Attributes:
      dataset_id: nnU-Net's; None takes the job's for the site.
      job: A job folder; None looks at data and machine only.
      site: The site's name in the job.
      overrides: Of the job's settings.
      server: Host and port of the FLARE server; None does not try.
      workspace: The run's folder; None if it is not known.
      quick: Whether to forecast without preprocessing a case and training on it.
    """

    dataset_id: int | None = None
    job: Path | None = None
    site: str = ""
    overrides: tuple[Override, ...] = ()
    server: tuple[str, int] | None = None
    workspace: Path | None = None
    quick: bool = False


@dataclass
class Report:
    """Findings by section, and the forecast if there is one."""

    sections: dict[str, list[Finding]] = field(default_factory=dict)
    forecast: Forecast | None = None

    def add(self, section: str, *findings: Finding) -> None:
        """Append findings to a section."""
        self.sections.setdefault(section, []).extend(findings)

    def count(self, level: Level) -> int:
        """Findings of this level."""
        return sum(finding.level is level for findings in self.sections.values() for finding in findings)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        findings = [{"section": s, **asdict(f)} for s, all_of_it in self.sections.items() for f in all_of_it]
        return {
            "problems": self.count(Level.PROBLEM),
            "warnings": self.count(Level.WARNING),
            "findings": findings,
            "forecast": None if self.forecast is None else self.forecast.to_dict(),
        }


def examine(request: Request) -> Report:
    """Run all checks; what is wrong becomes a finding, and later checks that need it are left out."""
    report = Report()
    report.add("Machine", *machine_findings())
    if request.server is not None:
        report.add("Machine", server_finding(*request.server))
    asked = _job(request, report)
    dataset = _dataset(request, asked, report)
    report.add("Folders", *folder_findings(request.workspace, dataset))
    facts: list[CaseFacts] = []
    if dataset is not None:
        facts = _data_findings(dataset, asked, report)
    if asked is not None and dataset is not None and facts:
        _forecast(request, asked, dataset, facts, report)
    _resources(request, asked, report)
    return report


def _job(request: Request, report: Report) -> JobSite | None:
    if request.job is None:
        return None
    try:
        asked = read_job(request.job, request.site, request.overrides)
    except (ValueError, OSError) as error:
        report.add("Job", problem("job", str(error)))
        return None
    algorithm, config = type(asked.algorithm).__name__, asked.config
    detail = f"{algorithm}, site {asked.name}: {config.modality}, {config.task}, fold {config.fold}"
    report.add("Job", ok("job", f"{asked.job.name}, {detail}"))
    return asked


def _dataset(request: Request, asked: JobSite | None, report: Report) -> Path | None:
    dataset_id = request.dataset_id
    if dataset_id is None and asked is not None:
        dataset_id = asked.config.dataset_id
    if dataset_id is None:
        return None
    try:
        return find_dataset(nnunet_folder("nnUNet_raw"), dataset_id)
    except OSError:
        return None  # the variable is a finding of its own
    except DatasetError as error:
        report.add("Data set", problem("data set", str(error)))
        return None


def _data_findings(dataset: Path, asked: JobSite | None, report: Report) -> list[CaseFacts]:
    """Add what the data set's checks say; returns facts of all cases, or none if a job would refuse the data set."""
    found = _single_case_findings(dataset, asked)
    report.add("Data set", *found)
    sound = all(finding.level is Level.OK for finding in found)
    try:
        dataset_json = read_dataset_json(dataset)
        facts = read_facts(dataset, dataset_json)
    except READ_ERRORS:  # DatasetError among them
        if sound:
            raise
        expected = "3-D images that can be read, a label for each case"
        report.add("Data set", warning("data set", "checks across cases left out", expected, "Run this again then."))
        return []
    report.add("Data set", *across_cases(facts, channel_names(dataset_json), dataset_json["labels"]))
    return facts if sound else []


def _single_case_findings(dataset: Path, asked: JobSite | None) -> list[Finding]:
    """What a job checks before it trains: every file, each case's grid, labels and classes, and the split."""
    config = None if asked is None else asked.config
    fold = None if config is None else config.fold
    try:
        summary = check_dataset(
            dataset,
            num_folds=None if fold == "all" else 5,
            channels=None if config is None else config.channels,
            missing_channels=config is not None and config.missing_channels,
        )
        if asked is not None:
            with_score_regions(read_dataset_json(dataset), asked.config.score_regions, f"site {asked.name!r}")
        classes = _class_findings(dataset, config)
        if fold != "all":
            _check_split(dataset, summary.training_cases, fold)
    except (DatasetError, EvaluationError) as error:
        lines = [line.removeprefix("- ") for line in str(error).splitlines() if line.startswith(("- ", "... "))]
        return [problem("data set", line) for line in lines or [str(error)]]
    counts = f"{summary.num_training} training and {summary.num_test} test cases of {list(summary.channel_names)}"
    return [ok("data set", f"{summary.name}: {counts}; every file read, one grid per case"), *classes]


def _check_split(dataset: Path, cases: Sequence[str], fold: int | None) -> None:
    """Raise DatasetError if a job would refuse the split that it finds; without a job, if it could refuse a fold."""
    try:
        preprocessed = nnunet_folder("nnUNet_preprocessed")
    except OSError:
        preprocessed = None  # the variable is a finding of its own
    file = find_splits(dataset, preprocessed)
    if file is not None:
        check_splits(file, cases, fold)


def _class_findings(dataset: Path, config: SiteConfig | None) -> list[Finding]:
    if config is None or config.task != "classification":
        return []
    dataset_json = read_dataset_json(dataset)
    classes = read_classes(dataset, dataset_json, config.classes)
    counts = [sum(index == known for known in classes.cases.values()) for index in range(len(classes.names))]
    shown = ", ".join(f"{name} {count}" for name, count in zip(classes.names, counts, strict=True))
    return [ok("classes", f"{shown}, training and test cases together")]


def _forecast(request: Request, asked: JobSite, dataset: Path, facts: Sequence[CaseFacts], report: Report) -> None:
    device = site_device(asked.config)
    try:
        plan = plan_alone(asked, dataset)
        forecast = forecast_bytes(asked, plan, facts, device)
        if not request.quick and _fits(forecast.memory_bytes, device, report):
            measured = measure(asked, plan, a_case(plan), device)
            forecast = with_measurement(forecast, measured, asked, plan, facts)
    except (ValueError, RuntimeError, OSError) as error:
        report.add("Forecast", problem("forecast", f"{type(error).__name__}: {error}"))
        return
    report.forecast = forecast
    report.add("Forecast", *forecast.findings())


def _fits(needed: int, device: torch.device, report: Report) -> bool:
    """Whether a step may be tried: a machine that runs out of main memory kills processes, not only this one."""
    if device.type == "cuda" and not torch.cuda.is_available():
        return False  # a finding of its own
    free = torch.cuda.mem_get_info()[0] if device.type == "cuda" else psutil.virtual_memory().available
    if needed < free:
        return True
    expected = f"{readable_bytes(needed)} free"
    report.add("Forecast", warning("time", f"no step was tried with {readable_bytes(free)}", expected, ""))
    return False


def _resources(request: Request, asked: JobSite | None, report: Report) -> None:
    """Disk, memory and GPU against the forecast, if there is one."""
    forecast = report.forecast
    needs = {} if forecast is None else forecast.disk_needs()
    report.add("Folders", *disk_findings(workspace_needs(request.workspace, needs)))
    device = "auto" if asked is None else asked.config.device
    on_gpu = torch.cuda.is_available() and device != "cpu"
    needed = None if forecast is None else forecast.memory_bytes
    report.add("Machine", *memory_findings(None if on_gpu else needed))
    report.add("Machine", *gpu_findings(device, needed if on_gpu else None))
