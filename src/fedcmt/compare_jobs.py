"""The jobs of a comparison: each method's own job folder, staged so that only what is compared differs, and their data.

A method is a job of ``jobs/``, perhaps with settings of its own. Its staged folder holds every value that its runs use
except the seed, so that what ran can be read there. Data sets that a job generates or cuts are made once for all.
"""

import hashlib
import json
import math
import operator
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from fedcmt.algorithms.base import Participant
from fedcmt.config import SERVER_CONFIG, JobConfig, SiteConfig, build_algorithm, component, site_apps, workflow_args
from fedcmt.data.checks import find_dataset, list_cases, read_dataset_json
from fedcmt.data.phantoms import make_cohort
from fedcmt.data.split import dataset_names, make_cuts
from fedcmt.job_folder import Override, apply_overrides, cohort_of, demo_profile, find_job, parse_override, stage
from fedcmt.json_file import read_json, write_json

_SAME_AT_EACH_SITE = ("task", "classes", "modality", "channels", "fold", "score_regions")
_OWN_OF_A_POOLED_SITE = ("dataset_id", "task", "classes", "modality", "channels")
_LABEL = r"[A-Za-z0-9][A-Za-z0-9_-]*"
_SAME_STEPS = 0.01
"""Numbers of steps count as equal up to this share: FedMEPD's first round of a thousand is the fusion site's alone."""
_RESERVED_LABELS = ("jobs", "preprocessed", "nnUNet_raw", "previous")


class ComparisonError(ValueError):
    """Jobs that cannot be compared as asked; the message names the difference."""


@dataclass(frozen=True)
class Method:
    """One row of the comparison.

    Attributes:
      label: What it is called in tables and folders.
      job: The job of ``jobs/`` it is.
      overrides: Settings of this method alone.
    """

    label: str
    job: str
    overrides: tuple[Override, ...] = ()


@dataclass(frozen=True)
class Frame:
    """What all methods have in common.

    Attributes:
      overrides: Settings for every job: rounds, steps and what ``--set`` gives.
      on: The job whose sites, data, planning and training settings every federated method takes; None for each its own.
      demo: Use the jobs' generated cohorts.
    """

    overrides: tuple[Override, ...] = ()
    on: str | None = None
    demo: bool = False


@dataclass(frozen=True)
class StagedJob:
    """A method's job folder, checked.

    Attributes:
      method: The method.
      config: What the folder says.
      recipe: How its data sets are made (``cohort``: generated, ``cuts``: cut from others); empty if they are given.
    """

    method: Method
    config: JobConfig
    recipe: dict[str, Any] = field(default_factory=dict)

    @property
    def is_pooled(self) -> bool:
        """Whether it has one site only, which beside a federation is training on the pooled data."""
        return len(self.config.sites) == 1


# ---------------------------------------------------------------------------------------------------------------------
# Names on the command line


def parse_job(text: str) -> Method:
    """``JOB`` or ``JOB=LABEL``.

    Raises:
      ComparisonError: If the label cannot be a folder's name.
    """
    job, equals, label = text.partition("=")
    return Method(_checked_label(label if equals else job.rstrip("/"), text), job)


def parse_variant(text: str) -> Method:
    """``LABEL=JOB[,TARGET.KEY=VALUE...]``; a comma inside a JSON value does not part settings.

    Raises:
      ComparisonError: If there is no job, or the label cannot be a folder's name.
      ConfigError: If a setting is not of the form TARGET.KEY=VALUE.
    """
    label, equals, rest = text.partition("=")
    job, *settings = re.split(r",(?=\w+\.[\w.]+=)", rest)
    if not (equals and job):
        raise ComparisonError(f"--variant {text!r}: expected LABEL=JOB[,algorithm.KEY=VALUE...]")
    return Method(_checked_label(label, text), job, tuple(parse_override(setting) for setting in settings))


def _checked_label(label: str, text: str) -> str:
    if not re.fullmatch(_LABEL, label) or "__" in label or label in _RESERVED_LABELS:
        raise ComparisonError(
            f"{text!r}: {label!r} cannot be a label; expected letters, digits, - and single _, and none of "
            f"{', '.join(_RESERVED_LABELS)}"
        )
    return label


# ---------------------------------------------------------------------------------------------------------------------
# Staging


def stage_methods(jobs: Path, methods: Sequence[Method], frame: Frame, target: Path) -> list[StagedJob]:
    """Write each method's job folder to ``target/LABEL`` and check that they can be compared.

    Args:
      jobs: The folder of job folders; it is only read.
      methods: In the order of the tables.
      frame: What they have in common.
      target: Replaced if it is there.

    Raises:
      ComparisonError: If labels repeat, or sites, data sets, folds or numbers of steps differ.
      ConfigError: If a job is unknown or a setting does not fit.
    """
    labels = [method.label for method in methods]
    if repeated := sorted({label for label in labels if labels.count(label) > 1}):
        raise ComparisonError(f"labels {repeated} come twice; give one of them another, JOB=LABEL")
    if target.exists():
        shutil.rmtree(target)
    staged = [_stage(jobs, method, frame, target / method.label) for method in methods]
    _check_targets(frame.overrides, staged)
    check_comparable(staged)
    return staged


def _stage(jobs: Path, method: Method, frame: Frame, folder: Path) -> StagedJob:
    source = find_job(jobs, method.job)
    pooled = len(site_apps(source)) == 1
    host = find_job(jobs, frame.on) if frame.on and not pooled else source
    profile = _profile(host, frame.demo)
    stage(host, folder)
    _apply(folder, profile["set"].items() if profile else ())
    if host != source:
        _take_algorithm(folder, source, frame.demo)
    elif frame.on and pooled:
        host_job = Method(find_job(jobs, frame.on).name, frame.on)
        _take_settings(folder, _stage(jobs, host_job, frame, folder.with_name(".frame")).config)
    _apply(folder, frame.overrides)
    apply_overrides(folder, method.overrides)
    meta = read_json(folder / "meta.json")
    write_json(folder / "meta.json", {**meta, "name": method.label}, indent=2)
    config = JobConfig.from_folder(folder)
    build_algorithm(config.algorithm)
    return StagedJob(method, config, _recipe(host, profile, config))


def _profile(job: Path, demo: bool) -> dict[str, Any] | None:
    """The demo profile, if the demo cohort is wanted."""
    if not demo:
        return None
    profile = demo_profile(job)
    if profile is None:
        raise ComparisonError(
            f"job {job.name!r} has no demo cohort (jobs/{job.name}/demo.json). Set nnUNet_raw to the folder that holds "
            "your data sets, or leave the job out."
        )
    return profile


def _apply(folder: Path, overrides: Iterable[Override]) -> None:
    """Apply those overrides whose target the job has."""
    targets = {"server", "algorithm", "sites", *site_apps(folder)}
    apply_overrides(folder, [(key, value) for key, value in overrides if key.split(".")[0] in targets])


def _check_targets(overrides: Sequence[Override], staged: Sequence[StagedJob]) -> None:
    sites = {site for job in staged for site in job.config.sites}
    for key, _ in overrides:
        if key.split(".")[0] not in {"server", "algorithm", "sites", *sites}:
            raise ComparisonError(f"--set {key}: no job has this target; sites are {sorted(sites)}")


def _take_algorithm(folder: Path, source: Path, demo: bool) -> None:
    """Replace a staged job's algorithm by that of another job, as this runs it."""
    spec = component(read_json(source / SERVER_CONFIG), "aggregator", source / SERVER_CONFIG)
    files = {folder / SERVER_CONFIG: "aggregator"}
    for app in site_apps(folder).values():
        files[folder / app / "config" / "config_fed_client.json"] = "algorithm"
    for file, component_id in files.items():
        config = read_json(file)
        component(config, component_id, file)  # raises if it is not there
        entry = next(c for c in config["components"] if c["id"] == component_id)
        entry.update(spec)
        write_json(file, config, indent=2)
    profile = demo_profile(source) if demo else None
    own = profile["set"].items() if profile else ()
    apply_overrides(folder, [(key, value) for key, value in own if key.startswith("algorithm.")])


def _take_settings(folder: Path, host: JobConfig) -> None:
    """Give a one-site job a federation's rounds, planning and training settings, on which its sites must agree."""
    server = read_json(folder / SERVER_CONFIG)
    args = workflow_args(server, folder / SERVER_CONFIG)
    args.update(num_rounds=host.server.num_rounds, planning=host.server.planning)
    write_json(folder / SERVER_CONFIG, server, indent=2)
    sites = [asdict(site) for site in host.sites.values()]
    shared = {key: value for key, value in sites[0].items() if key not in _OWN_OF_A_POOLED_SITE}
    if differing := sorted(key for key in shared if any(site[key] != shared[key] for site in sites)):
        raise ComparisonError(
            f"{folder.name}: the sites of {host.name} (--on) differ in {differing}, so a job of one site cannot take "
            f"these from them; make them equal with --set sites.{differing[0]}=VALUE"
        )
    for app in site_apps(folder).values():
        file = folder / app / "config" / "site.json"
        write_json(file, {**read_json(file), **shared}, indent=2)


def _recipe(host: Path, profile: Mapping[str, Any] | None, config: JobConfig) -> dict[str, Any]:
    """How the data sets of a job are made; empty if it uses data sets that are there."""
    if profile is not None:
        return {"cohort": profile["cohort"], "cuts": profile.get("cuts", [])}
    cohort = cohort_of(host)
    if cohort is None:
        return {}
    made = {int(name[len("Dataset") :][:3]) for name in dataset_names(cohort)}
    return {"cut": cohort} if made & {site.dataset_id for site in config.sites.values()} else {}


# ---------------------------------------------------------------------------------------------------------------------
# What must not differ


def federated(staged: Sequence[StagedJob]) -> list[StagedJob]:
    """The jobs of several sites; all of them if none has."""
    return [job for job in staged if not job.is_pooled] or list(staged)


def pooled(staged: Sequence[StagedJob]) -> list[StagedJob]:
    """The jobs of one site beside a federation."""
    several = federated(staged)
    return [job for job in staged if job not in several]


def check_comparable(staged: Sequence[StagedJob]) -> None:
    """Refuse jobs whose sites, data sets, tasks, folds or numbers of steps differ.

    Raises:
      ComparisonError: Naming the first difference, and how to do away with it.
    """
    first, *others = federated(staged)
    for other in others:
        _check_same_sites(first, other)
    most = max(_steps(first.config).values())
    for other in [*others, *pooled(staged)]:
        steps = dict.fromkeys(other.config.sites, most) if other.is_pooled else _steps(first.config)
        if difference := _first_difference(steps, _steps(other.config), _as_long):
            raise ComparisonError(
                f"{first.method.label} and {other.method.label} do not train equally long: steps of {difference}. "
                "Give --rounds and --local-steps, or each --variant its server.num_rounds and SITE.local_steps."
            )
    for other in pooled(staged):
        if {other.config.sites[site].fold for site in other.config.sites} != {
            s.fold for s in first.config.sites.values()
        }:
            raise ComparisonError(
                f"{first.method.label} and {other.method.label} hold back different parts of the training cases: fold "
                "differs. Give --set sites.fold=VALUE."
            )
    if len({bool(job.recipe) for job in staged}) > 1:
        made = sorted(job.method.label for job in staged if job.recipe)
        raise ComparisonError(f"only {made} make their own data sets, the others use those under nnUNet_raw")


def _check_same_sites(first: StagedJob, other: StagedJob) -> None:
    here, there = _site_facts(other), _site_facts(first)
    if difference := _first_difference(there, here):
        differing = [key for key in here if here[key] != there.get(key)]
        of_other_splits = all(key.endswith(".dataset_id") for key in differing)
        raise ComparisonError(
            f"{first.method.label} and {other.method.label} do not train on the same: {difference}. "
            f"--on {first.method.job} runs every algorithm on the sites and data of {first.method.job}"
            + (", or compare jobs of one split at a time." if of_other_splits else ".")
        )


def _site_facts(job: StagedJob) -> dict[str, Any]:
    facts: dict[str, Any] = {"sites": sorted(job.config.sites)}
    for name, site in job.config.sites.items():
        facts[f"{name}.dataset_id"] = _patients(job.recipe.get("cohort", {}), site.dataset_id)
        facts |= {f"{name}.{key}": getattr(site, key) for key in _SAME_AT_EACH_SITE}
    return facts


def _patients(cohort: Mapping[str, Mapping[str, Any]], dataset_id: int) -> int | str:
    """What tells the patients of a data set: its id, but of a generated one its name and all but its channels, which
    one method may take as zeros where another goes without."""
    for dataset, spec in cohort.items():
        if dataset.startswith(f"Dataset{dataset_id:03}_"):
            drawn = {key: value for key, value in spec.items() if key not in ("channels", "blank")}
            return f"{dataset.partition('_')[2]} {json.dumps(drawn, sort_keys=True)}"
    return dataset_id


def _steps(config: JobConfig) -> dict[str, int]:
    """Site to the optimiser steps it takes: its own of a round, as often as the algorithm gives it a turn."""
    algorithm = build_algorithm(config.algorithm)
    sites = [Participant(name, site.modality, (), 1, {}, site.role) for name, site in config.sites.items()]
    played = Counter(
        site.name
        for round_idx in range(config.server.num_rounds)
        for turn in algorithm.turns(round_idx, sites)
        for site in turn
    )
    return {name: played[name] * site.local_steps for name, site in config.sites.items()}


def _as_long(steps: int, others: int) -> bool:
    return math.isclose(steps, others, rel_tol=_SAME_STEPS)


def _first_difference(
    one: Mapping[str, Any], other: Mapping[str, Any], same: Callable[[Any, Any], bool] = operator.eq
) -> str | None:
    for key in [*one, *(key for key in other if key not in one)]:
        if not same(one.get(key), other.get(key)):
            return f"{key} is {one.get(key)!r} there and {other.get(key)!r} here"
    return None


# ---------------------------------------------------------------------------------------------------------------------
# Settings, to know a run by


def method_settings(job: StagedJob) -> dict[str, Any]:
    """All that a method's runs are made from, except the seed; JSON-able."""
    server = {key: value for key, value in asdict(job.config.server).items() if key != "seed"}
    sites = {name: asdict(site) for name, site in job.config.sites.items()}
    settings = {"job": job.method.job, "algorithm": job.config.algorithm, "server": server, "sites": sites}
    return json.loads(json.dumps(settings))


def settings_hash(*settings: Mapping[str, Any]) -> str:
    """Twelve hexadecimal digits that change with any value of the settings."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


def flattened(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested objects as one with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            flat |= flattened(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def readable_settings(job: StagedJob) -> dict[str, Any]:
    """`method_settings` with dotted keys: a value that all sites share stands once; data sets and empty objects not."""
    settings = method_settings(job)
    sites = {
        name: {k: v for k, v in flattened(own).items() if k not in _OWN_OF_A_POOLED_SITE and v != {}}
        for name, own in settings.pop("sites").items()
    }
    readable = {key: value for key, value in flattened(settings).items() if value != {}}
    first = next(iter(sites.values()))
    for key in dict.fromkeys(key for own in sites.values() for key in own):
        if all(key in own and own[key] == first[key] for own in sites.values()):
            readable[f"sites.{key}"] = first[key]
        else:
            readable |= {f"{name}.{key}": own[key] for name, own in sites.items() if key in own}
    return readable


def kept_threads(path: Path) -> int | None:
    """The CPU threads per site that stand in a comparison's ``settings.json``; None if there is no such file."""
    return read_json(path)["common"]["threads"] if path.exists() else None


def remember_settings(
    path: Path, common: Mapping[str, Any], methods: Mapping[str, Mapping[str, Any]], finished: Collection[str]
) -> None:
    """Keep the settings of a comparison's folder, or refuse others than those it has results of.

    Args:
      path: ``settings.json`` of the folder; further methods are added to it, those without a finished run replaced.
      common: What is the same for all methods.
      methods: Label to `method_settings`.
      finished: Labels of the methods that have a finished run there.

    Raises:
      ComparisonError: If one differs from what is there, naming it.
    """
    before = read_json(path) if path.exists() and finished else {"common": common, "methods": {}}
    binding = {label: settings for label, settings in before["methods"].items() if label in finished}
    pairs = [("all methods", before["common"], common)]
    pairs += [(label, binding[label], own) for label, own in methods.items() if label in binding]
    for who, old, new in pairs:
        if difference := _first_difference(flattened(old), flattened(new)):
            raise ComparisonError(
                f"{path.parent} holds runs with other settings: {who}: {difference}. Give --out another folder, or the "
                "settings of before."
            )
    write_json(path, {"common": common, "methods": {**binding, **methods}}, indent=2)


# ---------------------------------------------------------------------------------------------------------------------
# Data


def make_data(staged: Sequence[StagedJob], own_raw: Path) -> Path:
    """See that every site's data set is there, making those that the jobs generate or cut.

    Args:
      staged: The jobs.
      own_raw: Where data sets are made.

    Returns:
      The folder that holds the data sets: ``own_raw``, or what ``nnUNet_raw`` names if none is made.

    Raises:
      ComparisonError: If data sets are needed and ``nnUNet_raw`` is not set, or no site has test cases.
      DatasetError, ValueError, FileExistsError: As `make_cohort`, `make_cuts` and `find_dataset`.
    """
    given = Path(os.environ["nnUNet_raw"]).absolute() if os.environ.get("nnUNet_raw") else None
    recipes = [job.recipe for job in staged]
    for recipe in [recipe for index, recipe in enumerate(recipes) if recipe not in recipes[:index]]:
        if "cohort" in recipe:
            make_cohort(own_raw, recipe["cohort"])
            if recipe["cuts"]:
                make_cuts(own_raw, own_raw, {"cuts": recipe["cuts"]})
        elif given is None:
            raise ComparisonError("nnUNet_raw is not set; set it to the folder of your data sets, or give --demo")
        elif recipe:
            make_cuts(given, own_raw, recipe["cut"])
    raw = own_raw if staged[0].recipe else given
    assert raw is not None
    for job in staged:
        for site in job.config.sites.values():
            read_dataset_json(find_dataset(raw, site.dataset_id))
    sites = federated(staged)[0].config.sites
    if not any(_has_test_cases(raw, site) for site in sites.values()):
        raise ComparisonError(f"{raw}: no site of {sorted(sites)} has test cases (imagesTs, labelsTs) to compare on")
    return raw


def sites_of_test_cases(staged: Sequence[StagedJob], raw: Path) -> dict[str, str]:
    """Test case to the site it is of, where jobs of one site need it; empty if there is no such job.

    Raises:
      ComparisonError: If a one-site job's labels, training cases or test cases are not those of all sites together.
    """
    if not pooled(staged):
        return {}
    config = federated(staged)[0].config
    tests: dict[str, str] = {}
    for name, site in config.sites.items():
        for case in _cases(raw, site, "imagesTs"):
            if case in tests:
                raise ComparisonError(f"test case {case} is at sites {tests[case]!r} and {name!r}; names must differ")
            tests[case] = name
    training = {case for site in config.sites.values() for case in _cases(raw, site, "imagesTr")}
    for job in pooled(staged):
        (name, site), *_ = job.config.sites.items()
        where = f"{job.method.label}: data set {site.dataset_id} of site {name!r}"
        for other_name, other in config.sites.items():
            if _scored(raw, other) != _scored(raw, site):
                raise ComparisonError(
                    f"{where} has other labels or another task than site {other_name!r}, or other score_regions"
                )
        _check_same_cases(f"{where}: training cases", _cases(raw, site, "imagesTr"), training)
        _check_same_cases(f"{where}: test cases", _cases(raw, site, "imagesTs"), set(tests))
    return tests


def _has_test_cases(raw: Path, site: SiteConfig) -> bool:
    folder = find_dataset(raw, site.dataset_id)
    return (folder / ("imagesTs" if site.task == "classification" else "labelsTs")).is_dir()


def _cases(raw: Path, site: SiteConfig, images: str) -> set[str]:
    folder = find_dataset(raw, site.dataset_id)
    return set(list_cases(folder, read_dataset_json(folder), images=images))


def _scored(raw: Path, site: SiteConfig) -> tuple[Any, ...]:
    return read_dataset_json(find_dataset(raw, site.dataset_id))["labels"], site.score_regions, site.task


def _check_same_cases(where: str, own: set[str], theirs: set[str]) -> None:
    for problem, cases in (("of no site's data set", own - theirs), ("missing", theirs - own)):
        if cases:
            raise ComparisonError(f"{where}: {len(cases)} are {problem}, e.g. {', '.join(sorted(cases)[:3])}")


def adopt(staged: Sequence[StagedJob], folder: Path) -> list[StagedJob]:
    """Move staged jobs to ``folder/LABEL``, where their runs find them."""
    folder.mkdir(parents=True, exist_ok=True)
    adopted = []
    for job in staged:
        target = folder / job.method.label
        if target.exists():
            shutil.rmtree(target)
        job.config.folder.replace(target)
        adopted.append(replace(job, config=JobConfig.from_folder(target)))
    return adopted
