"""Job folders: finding one, and a copy of it under the workspace with overrides applied. ``jobs/`` is never written
to."""

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedcmt.config import SERVER_CONFIG, ConfigError, component, site_apps, workflow_args
from fedcmt.json_file import read_json, write_json

Override = tuple[str, Any]
"""("target.key.key", value); the target is ``server``, ``algorithm``, ``sites`` (all of them) or one site's name."""


def find_job(jobs: Path, name: str) -> Path:
    """The folder of a job by name.

    Raises:
      ConfigError: If there is no such job; lists those there are.
    """
    name = name.rstrip("/")
    known = sorted(p.parent.name for p in jobs.glob("*/meta.json"))
    if name not in known:
        raise ConfigError(f"unknown job {name!r}; jobs in {jobs}: {known}")
    return jobs / name


def parse_override(text: str) -> Override:
    """``client1.local_steps=10`` to its key and value; the value is read as JSON where it is JSON, else as text.

    Raises:
      ConfigError: If there is no ``=`` or no target.
    """
    key, equals, value = text.partition("=")
    if not equals or "." not in key:
        raise ConfigError(f"--set {text!r}: expected TARGET.KEY=VALUE, e.g. client1.local_steps=10 or server.seed=3")
    try:
        return key, json.loads(value)
    except json.JSONDecodeError:
        return key, value


def materialise(source: Path, target: Path, overrides: Iterable[Override]) -> None:
    """Copy a job folder and apply overrides to the copy.

    Raises:
      ConfigError: If an override names an unknown target.
    """
    if source.resolve() == target.resolve() or source.resolve() in target.resolve().parents:
        raise ConfigError(f"{target} is inside the job folder {source}; give --workspace another folder")
    if target.exists():
        shutil.rmtree(target)
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("demo.json", "cohort.json", "README.md"))
    sites = site_apps(target)
    for key, value in overrides:
        who, *path = key.split(".")
        if not path:
            raise ConfigError(f"override {key!r}: expected TARGET.KEY")
        if who == "server":
            _edit(target / SERVER_CONFIG, path, value, lambda c, f: workflow_args(c, f))
        elif who == "algorithm":
            _edit(target / SERVER_CONFIG, path, value, lambda c, f: _component_args(c, "aggregator", f))
            for app in sites.values():
                file = target / app / "config" / "config_fed_client.json"
                _edit(file, path, value, lambda c, f: _component_args(c, "algorithm", f))
        elif who == "sites" or who in sites:
            for site in sites if who == "sites" else [who]:
                _edit(target / sites[site] / "config" / "site.json", path, value, lambda c, f: c)
        else:
            raise ConfigError(f"override {key!r}: {who!r} is not one of server, algorithm, sites, {', '.join(sites)}")


def demo_profile(job: Path) -> dict[str, Any] | None:
    """The job's ``demo.json``: ``cohort`` (data sets to generate) and ``set`` (overrides); None if it has none."""
    path = job / "demo.json"
    return read_json(path) if path.exists() else None


def cohort_of(job: Path) -> dict[str, Any] | None:
    """The job's ``cohort.json``: how its sites' data sets are cut from one under ``nnUNet_raw``; None if it has none.

    ``{"same_as": "OTHER"}`` takes another job's.
    """
    path = job / "cohort.json"
    if not path.exists():
        return None
    cohort = read_json(path)
    return read_json(find_job(job.parent, cohort["same_as"]) / "cohort.json") if "same_as" in cohort else cohort


def _edit(file: Path, path: Sequence[str], value: Any, root: Any) -> None:
    config = read_json(file)
    node = root(config, file)
    for key in path[:-1]:
        node = node.setdefault(key, {})
        if not isinstance(node, dict):
            raise ConfigError(f"override {'.'.join(path)!r}: {key!r} in {file} is not an object")
    node[path[-1]] = value
    write_json(file, config, indent=2)


def _component_args(config: Mapping[str, Any], component_id: str, file: Path) -> dict[str, Any]:
    component(config, component_id, file)  # raises if it is not there
    entry = next(c for c in config["components"] if c["id"] == component_id)
    return entry.setdefault("args", {})
