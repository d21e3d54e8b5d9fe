"""What a job folder says, read in one place: frozen dataclasses that reject keys nobody knows.

A job folder holds ``meta.json`` (who takes part), ``server/config/config_fed_server.json`` (rounds, planning, the
algorithm as FLARE component ``aggregator``) and, for each site, ``<site>/config/config_fed_client.json`` (the site's
half of the algorithm) with ``site.json`` (data and local training).
"""

import importlib
import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

from fedcmt.algorithms.base import Algorithm
from fedcmt.data.classes import SOURCES
from fedcmt.evaluation.regions import REGIONS_EXPECTED, is_regions
from fedcmt.json_file import read_json
from fedcmt.privacy.terms import PrivacyTerms
from fedcmt.settings import is_int, is_number, needed_keys, require
from fedcmt.wire import UPDATE_DTYPES
from fedcmt.workspace import is_job_id

SERVER_CONFIG = Path("server/config/config_fed_server.json")
NAME_EXPECTED = "letters, digits, _ and -, the first a letter or a digit"

TASKS = ("segmentation", "classification")

_T = TypeVar("_T")


def is_name(name: object) -> bool:
    """Whether this may name a job, a site or an app folder: it is part of paths, and must not lead out of a folder."""
    return isinstance(name, str) and re.fullmatch("[A-Za-z0-9][A-Za-z0-9_-]*", name) is not None


def check_job_name(name: object, where: str) -> None:
    """Raise `ConfigError` unless it is one: with the site's name it names plans and models in the site's folders."""
    _require(is_name(name), where, "name", name, f"the job's name, of {NAME_EXPECTED}")


class ConfigError(ValueError):
    """A job or its configuration is not usable; the message says where, what came and what was expected."""


def _build(cls: type[_T], values: Mapping[str, Any], where: str) -> _T:
    known = sorted(f.name for f in fields(cls))  # type: ignore[arg-type]
    if unknown := sorted(set(values) - set(known)):
        raise ConfigError(f"{where}: unknown keys {unknown}; known keys: {known}")
    if missing := [key for key in needed_keys(cls) if key not in values]:
        raise ConfigError(f"{where}: missing keys {missing}; known keys: {known}")
    return cls(**values)


def _require(ok: bool, where: str, key: str, value: object, expected: str) -> None:
    require(ok, where, key, value, expected, ConfigError)


@dataclass(frozen=True)
class OptimizerConfig:
    """The site's optimiser, one of torch.optim's."""

    name: Literal["AdamW", "Adam", "SGD"] = "AdamW"
    """Class name in ``torch.optim``."""
    lr: float = 3e-4
    """Initial learning rate, > 0."""
    weight_decay: float = 1e-5
    """As torch.optim defines it for the class; >= 0."""
    momentum: float = 0.0
    """SGD only; above 0 with Nesterov, as nnU-Net trains (0.99)."""
    schedule: Literal["constant", "poly", "exp_poly", "round_poly"] = "constant"
    """``poly`` is nnU-Net's (1 - step / all steps)^0.9 over all rounds; ``exp_poly`` times exp(-0.015 round), as
    Fed-MUnet trains; ``round_poly`` (1 - round / all rounds)^0.9, the same for all steps of a round, as FedMEPD."""
    reset: bool = False
    """Forget momentum and moments at the start of each round."""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str) -> Self:
        """Read and check.

        Raises:
          ConfigError: Naming the key, what came and what was expected.
        """
        config = _build(cls, values, where)
        _require(config.name in ("AdamW", "Adam", "SGD"), where, "name", config.name, "AdamW, Adam or SGD")
        _require(is_number(config.lr) and config.lr > 0, where, "lr", config.lr, "a number above 0")
        _require(
            is_number(config.weight_decay) and config.weight_decay >= 0,
            where,
            "weight_decay",
            config.weight_decay,
            ">= 0",
        )
        _require(
            is_number(config.momentum) and 0 <= config.momentum < 1, where, "momentum", config.momentum, "in [0, 1)"
        )
        _require(
            config.momentum == 0 or config.name == "SGD", where, "momentum", config.momentum, f"0 for {config.name}"
        )
        schedules = ("constant", "poly", "exp_poly", "round_poly")
        _require(config.schedule in schedules, where, "schedule", config.schedule, ", ".join(schedules))
        _require(isinstance(config.reset, bool), where, "reset", config.reset, "true or false")
        return config


@dataclass(frozen=True)
class SiteConfig:
    """``site.json``: a site's data and local training."""

    dataset_id: int
    """nnU-Net dataset id under ``nnUNet_raw``."""
    modality: str
    """Sites of one modality share their group tensors, e.g. "MR" or "CT"."""
    task: Literal["segmentation", "classification"] = "segmentation"
    """What the site trains for: label maps, or one class per case."""
    classes: Literal["classes.json", "classes.csv", "majority"] = "classes.json"
    """Classification only: where a case's class stands, a file beside dataset.json or its label image (the label with
    most voxels)."""
    channels: list[str] | None = None
    """Channel names the data set must have, in this order; null accepts dataset.json's."""
    missing_channels: bool = False
    """Whether an image of zeros stands for a sequence that its case lacks; augmentation then leaves it at zero."""
    fold: int | Literal["all"] = 0
    """nnU-Net fold: which fifth of the cases validates; "all" trains and validates on every case."""
    local_steps: int = 250
    """Optimiser steps per round."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    role: Literal["site", "fusion"] = "site"
    """"fusion" is the site that trains after the others in a round, for algorithms that have one (FedMEPD)."""
    loss: Literal["dice_ce", "dice", "fedmunet", "fedmepd"] = "dice_ce"
    """Segmentation only: nnU-Net's soft Dice and cross-entropy, 1 - soft Dice alone, or the loss that Fed-MUnet or
    FedMEPD was published with (labels only, no regions)."""
    grad_clip: float = 1.0
    """Gradients are scaled down to this 2-norm; nnU-Net itself uses 12."""
    val_every: int = 1
    """Validate every n-th round (and the last)."""
    val_batches: int = 50
    """Batches of patches per validation; the same patches each time when data loading runs in this process."""
    mirroring: bool = True
    """Mirror test-time augmentation when predicting whole volumes, nnU-Net's default."""
    mirror_axes: list[int] | None = None
    """Array axes (0 is z in 3D) along which training mirrors patches, and prediction may; null is all of them, as
    nnU-Net does. Leave out the left-right axis where labels tell left from right."""
    score_common: bool = True
    """Score the exported model on the test cases that all sites share (``imagesCommon``) too, where there are any."""
    score_regions: dict[str, list[int]] = field(default_factory=dict, hash=False)
    """Segmentation only: region name to label ids of a data set without regions. Whole cases are then scored by these
    unions instead of by single labels; training, plans and label maps know nothing of them."""
    num_workers: int | None = None
    """Processes that load and augment; null is nnU-Net's choice on a GPU and 0 (repeatable) on a CPU."""
    num_processes: int = 1
    """Processes that preprocess images; 1 works in the site's own."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """``auto`` uses a GPU when there is one."""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str) -> Self:
        """Read and check.

        Raises:
          ConfigError: Naming the key, what came and what was expected.
        """
        values = dict(values)
        given = values.get("optimizer", {})
        _require(isinstance(given, Mapping), where, "optimizer", given, "an object")
        optimizer = OptimizerConfig.from_dict(given, f"{where}: optimizer")
        config = _build(cls, {**values, "optimizer": optimizer}, where)
        _require(
            is_int(config.dataset_id) and 0 < config.dataset_id < 1000,
            where,
            "dataset_id",
            config.dataset_id,
            "1 to 999",
        )
        _require(
            isinstance(config.modality, str) and config.modality.strip() != "",
            where,
            "modality",
            config.modality,
            "e.g. MR or CT",
        )
        _require(config.task in TASKS, where, "task", config.task, " or ".join(TASKS))
        _require(config.classes in SOURCES, where, "classes", config.classes, ", ".join(SOURCES))
        _require(config.role in ("site", "fusion"), where, "role", config.role, "site or fusion")
        losses = ("dice_ce", "dice", "fedmunet", "fedmepd")
        _require(config.loss in losses, where, "loss", config.loss, ", ".join(losses))
        loss_ok = config.loss == "dice_ce" or config.task == "segmentation"
        _require(loss_ok, where, "loss", config.loss, "dice_ce, which leaves it to the task, at a site that classifies")
        fold_ok = config.fold == "all" or (is_int(config.fold) and 0 <= config.fold <= 4)
        _require(fold_ok, where, "fold", config.fold, '0 to 4, or "all"')
        for key, least in (("local_steps", 1), ("val_every", 1), ("val_batches", 1), ("num_processes", 1)):
            value = getattr(config, key)
            _require(is_int(value) and value >= least, where, key, value, f"a whole number from {least}")
        _require(is_number(config.grad_clip) and config.grad_clip > 0, where, "grad_clip", config.grad_clip, "above 0")
        for key in ("mirroring", "score_common", "missing_channels"):
            _require(isinstance(getattr(config, key), bool), where, key, getattr(config, key), "true or false")
        regions = config.score_regions
        _require(is_regions(regions), where, "score_regions", regions, REGIONS_EXPECTED)
        regions_ok = not regions or config.task == "segmentation"
        _require(regions_ok, where, "score_regions", regions, "{} at a site that classifies")
        axes = config.mirror_axes
        axes_ok = axes is None or (isinstance(axes, list) and all(is_int(a) and 0 <= a <= 2 for a in axes))
        _require(axes_ok, where, "mirror_axes", axes, "null or a list of array axes from 0 to 2")
        workers_ok = config.num_workers is None or (is_int(config.num_workers) and config.num_workers >= 0)
        _require(workers_ok, where, "num_workers", config.num_workers, "null or a whole number from 0")
        _require(config.device in ("auto", "cpu", "cuda"), where, "device", config.device, "auto, cpu or cuda")
        channels_ok = config.channels is None or (
            isinstance(config.channels, list) and all(isinstance(c, str) for c in config.channels)
        )
        _require(channels_ok, where, "channels", config.channels, "null or a list of channel names")
        return config

    @classmethod
    def from_file(cls, path: Path) -> Self:
        """Read ``site.json``."""
        return cls.from_dict(read_json(path), str(path))


@dataclass(frozen=True)
class ContributionConfig:
    """How sites' contributions are measured; see docs/contribution.md for what each tier costs."""

    tier: Literal[0, 1, 2, 3] = 0
    """0: directions of updates; 1: leave one out; 2: exact Shapley value; 3: sampled (GTG-Shapley)."""
    every: int = 1
    """Tiers 1 to 3: in each n-th round. Tier 0 is measured in every round."""
    between_rounds: float = 0.01
    """Tier 3: rounds that change the score by at most this give every site 0; 0 plays them all."""
    within_permutation: float = 0.001
    """Tier 3: a permutation ends where its prefix scores within this of all sites together; 0 goes to its end."""
    convergence: float = 0.05
    """Tier 3: stop when the values have changed by at most this fraction over ten permutations; above 0."""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str) -> Self:
        """Read and check.

        Raises:
          ConfigError: Naming the key, what came and what was expected.
        """
        config = _build(cls, values, where)
        _require(is_int(config.tier) and config.tier in (0, 1, 2, 3), where, "tier", config.tier, "0, 1, 2 or 3")
        _require(is_int(config.every) and config.every >= 1, where, "every", config.every, "a whole number from 1")
        for key in ("between_rounds", "within_permutation"):
            value = getattr(config, key)
            _require(is_number(value) and 0 <= value < 1, where, key, value, "in [0, 1)")
        stop = config.convergence
        _require(is_number(stop) and 0 < stop < 1, where, "convergence", stop, "in (0, 1)")
        return config


@dataclass(frozen=True)
class ServerConfig:
    """The args of the server's workflow `fedcmt.flare.server.FederatedRounds`."""

    num_rounds: int
    """Rounds to run."""
    planning: dict = field(default_factory=dict)
    """Keys of `fedcmt.nnunet.planning_options.PlanningOptions`."""
    min_sites: int | None = None
    """Fewer updates than this in a round end the job; null asks for every site."""
    seed: int = 0
    """Makes a CPU run repeatable."""
    round_timeout: int = 3600
    """Seconds a site may take for its part of a round; the server then goes on without it."""
    schedule_rounds: int | None = None
    """Rounds over which learning rates decay and distillation ramps up; null is ``num_rounds`` of the first start. A
    run that is resumed, for more rounds or with a site more, keeps it."""
    setup_timeout: int = 86400
    """Seconds a site may take to describe, to prepare, or to test and export: these read every image it has."""
    contribution: ContributionConfig = field(default_factory=ContributionConfig)
    """Measures what each site's updates are worth."""
    max_norm_ratio: float | None = None
    """Scales an update down to at most this multiple, from 1, of the median size of its round's; null leaves all as
    they are. See `fedcmt.influence`."""
    cross_site: bool = False
    """In the last round, score each site's model at every other site, which receives it for that."""
    privacy: PrivacyTerms = field(default_factory=PrivacyTerms)
    """Clipping, noise and the budget of epsilon; see docs/privacy.md."""
    update_dtype: Literal["float32", "float16", "int8"] = "float32"
    """Numbers of sites' updates on the wire; see `fedcmt.wire`. Models travel to sites as float32."""
    continues: str | None = None
    """In a provisioned network: FLARE's id of the job that began the federation this one goes on with."""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str) -> Self:
        """Read and check.

        Raises:
          ConfigError: Naming the key, what came and what was expected.
        """
        values = dict(values)
        given = values.get("contribution", {})
        _require(isinstance(given, Mapping), where, "contribution", given, "an object")
        contribution = ContributionConfig.from_dict(given, f"{where}: contribution")
        config = _build(cls, {**values, "contribution": contribution, "privacy": _privacy(values, where)}, where)
        _require(
            is_int(config.num_rounds) and config.num_rounds >= 1,
            where,
            "num_rounds",
            config.num_rounds,
            "a whole number from 1",
        )
        _require(
            config.schedule_rounds is None or (is_int(config.schedule_rounds) and config.schedule_rounds >= 1),
            where,
            "schedule_rounds",
            config.schedule_rounds,
            "null or a whole number from 1",
        )
        _require(isinstance(config.planning, dict), where, "planning", config.planning, "an object")
        _require(
            config.min_sites is None or (is_int(config.min_sites) and config.min_sites >= 1),
            where,
            "min_sites",
            config.min_sites,
            "null or >= 1",
        )
        _require(is_int(config.seed) and config.seed >= 0, where, "seed", config.seed, "a whole number from 0")
        for key in ("round_timeout", "setup_timeout"):
            value = getattr(config, key)
            _require(is_int(value) and value >= 1, where, key, value, "seconds, from 1")
        ratio = config.max_norm_ratio
        ratio_ok = ratio is None or (is_number(ratio) and ratio >= 1)
        _require(ratio_ok, where, "max_norm_ratio", ratio, "null or a number from 1")
        _require(isinstance(config.cross_site, bool), where, "cross_site", config.cross_site, "true or false")
        dtype, known = config.update_dtype, tuple(UPDATE_DTYPES)
        _require(isinstance(dtype, str) and dtype in known, where, "update_dtype", dtype, ", ".join(known))
        continues = config.continues
        _require(
            continues is None or is_job_id(continues), where, "continues", continues, "null or FLARE's id of a job"
        )
        # Its epsilon is that of a sum of updates, which rounding each of them is no function of.
        exact = config.privacy.mode != "distributed_client_dp" or dtype == "float32"
        _require(exact, where, "update_dtype", dtype, "float32 under distributed_client_dp")
        _require(
            contribution.tier == 0 or contribution.every <= config.num_rounds,
            f"{where}: contribution",
            "every",
            contribution.every,
            f"at most num_rounds, {config.num_rounds}",
        )
        return config


def _privacy(values: Mapping[str, Any], where: str) -> PrivacyTerms:
    given = values.get("privacy", {})
    _require(isinstance(given, Mapping), where, "privacy", given, "an object")
    try:
        return PrivacyTerms.from_dict(given, f"{where}: privacy")
    except (TypeError, ValueError) as error:
        raise ConfigError(str(error)) from error


@dataclass(frozen=True)
class JobConfig:
    """A whole job folder, checked.

    Attributes:
      folder: The job folder.
      name: The job's name in meta.json.
      server: Rounds and planning.
      algorithm: FLARE component ``aggregator``: ``{"path": ..., "args": {...}}``.
      sites: Site name to its configuration, in meta.json's order.
    """

    folder: Path
    name: str
    server: ServerConfig
    algorithm: dict
    sites: dict[str, SiteConfig]

    @classmethod
    def from_folder(cls, folder: Path) -> Self:
        """Read meta.json, the server's and every site's configuration.

        Raises:
          ConfigError: If something is missing, unknown or contradictory.
        """
        meta = read_json(folder / "meta.json")
        check_job_name(meta.get("name"), str(folder / "meta.json"))
        server_file = folder / SERVER_CONFIG
        server = read_json(server_file)
        algorithm = component(server, "aggregator", server_file)
        sites = {}
        for site, app in site_apps(folder).items():
            client_file = folder / app / "config" / "config_fed_client.json"
            theirs = component(read_json(client_file), "algorithm", client_file)
            if theirs != algorithm:
                raise ConfigError(
                    f"{client_file}: algorithm {theirs} differs from the server's aggregator {algorithm} in "
                    f"{server_file}"
                )
            sites[site] = SiteConfig.from_file(client_file.with_name("site.json"))
        config = ServerConfig.from_dict(workflow_args(server, server_file), str(server_file))
        if config.min_sites is not None and config.min_sites > len(sites):
            raise ConfigError(f"{server_file}: min_sites is {config.min_sites}, the job has {len(sites)} sites")
        _check_privacy(config.privacy, sites, server_file)
        return cls(folder, meta["name"], config, algorithm, sites)


def _check_privacy(terms: PrivacyTerms, sites: Mapping[str, SiteConfig], where: Path) -> None:
    """Refuse what `instance_dp` has no training for."""
    if terms.mode != "instance_dp":
        return
    for name, site in sites.items():
        if site.task != "segmentation":
            raise ConfigError(f"{where}: privacy: instance_dp is for sites that segment, {name} classifies")
        if site.num_workers:
            raise ConfigError(
                f"{where}: privacy: instance_dp draws each step's cases in the site's own process; {name} has "
                f"num_workers {site.num_workers}, expected null or 0"
            )


def site_apps(folder: Path) -> dict[str, str]:
    """Site name to its app folder, from ``meta.json``.

    Raises:
      ConfigError: If there is no site, a name could lead out of the job or the workspace, or two sites share a folder:
        ``site.json`` in it is one site's.
    """
    where = folder / "meta.json"
    deploy_map = read_json(where).get("deploy_map")
    if not isinstance(deploy_map, dict) or not all(map(_are_names, deploy_map.values())):
        raise ConfigError(f"{where}: deploy_map is {deploy_map!r}, expected app folders with their sites")
    apps = {app: [site for site in sites if site != "server"] for app, sites in deploy_map.items()}
    crowded = {app: sites for app, sites in apps.items() if len(sites) > 1 or "@ALL" in sites}
    if crowded:
        raise ConfigError(f"{where}: {crowded} share an app folder; give each site its own, with its own site.json")
    names = [*apps, *(site for sites in apps.values() for site in sites)]
    if outside := sorted(name for name in names if not is_name(name)):
        raise ConfigError(
            f"{where}: deploy_map names {outside}, expected app folders and sites of {NAME_EXPECTED}: they "
            "are folders beside one another"
        )
    found = {sites[0]: app for app, sites in apps.items() if sites}
    if not found:
        raise ConfigError(f"{where}: deploy_map names no site besides the server")
    return found


def workflow_args(server: Mapping[str, Any], where: Path) -> dict[str, Any]:
    """The args of the one workflow in a server configuration."""
    workflows = _objects(server, "workflows", where)
    if len(workflows) != 1:
        raise ConfigError(f"{where}: expected one workflow, found {len(workflows)}")
    args = workflows[0].setdefault("args", {})
    _require(isinstance(args, dict), f"{where}: workflow", "args", args, "an object")
    return args


def component(config: Mapping[str, Any], component_id: str, where: Path) -> dict:
    """The component of this id as ``{"path", "args"}``."""
    for entry in _objects(config, "components", where):
        if entry.get("id") == component_id:
            if "path" not in entry:
                raise ConfigError(f"{where}: component {component_id!r} has no path")
            return {"path": entry["path"], "args": entry.get("args", {})}
    raise ConfigError(f"{where}: no component with id {component_id!r}")


def _objects(config: Mapping[str, Any], key: str, where: Path) -> list[dict[str, Any]]:
    """The list of objects under a key."""
    entries = config.get(key, [])
    listed = isinstance(entries, list) and all(isinstance(entry, dict) for entry in entries)
    _require(listed, str(where), key, entries, "a list of objects")
    return entries


def _are_names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def build_algorithm(spec: Mapping[str, Any]) -> Algorithm:
    """The algorithm a job names by dotted path; the path is the registry.

    Raises:
      ConfigError: If the class is not one of ours, cannot be imported, or does not take these args.
    """
    module_name, _, class_name = str(spec["path"]).rpartition(".")
    if not module_name.startswith("fedcmt."):
        raise ConfigError(f"algorithm {spec['path']!r} is outside the package fedcmt")
    try:
        cls = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"algorithm {spec['path']!r}: {error}") from error
    if not (isinstance(cls, type) and issubclass(cls, Algorithm)):
        raise ConfigError(f"{spec['path']!r} is not an Algorithm (fedcmt.algorithms.base)")
    args, known = spec.get("args", {}), list(inspect.signature(cls).parameters)
    where = f"algorithm {spec['path']!r} with args {args}"
    if unknown := sorted(set(args) - set(known)):
        raise ConfigError(f"{where}: unknown args {unknown}; it takes {known or 'none'}")
    try:
        return cls(**args)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{where}: {error}") from error
