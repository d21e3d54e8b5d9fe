"""Job folders: finding one, and a copy of it under the workspace with overrides applied. ``jobs/`` is never written
to."""

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedcmt.config import NAME_EXPECTED, SERVER_CONFIG, ConfigError, component, is_name, site_apps, workflow_args
from fedcmt.json_file import read_json, write_json

_NOT_FLARE_S = ("demo.json", "cohort.json", "newcomer.json", "README.md")
_RESERVED = ("server", "algorithm", "sites")

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


def stage(source: Path, target: Path) -> None:
    """Copy a job folder, replacing what is at ``target``.

    Raises:
      ConfigError: If the target is inside the job folder.
    """
    if source.resolve() == target.resolve() or source.resolve() in target.resolve().parents:
        raise ConfigError(f"{target} is inside the job folder {source}; give --workspace another folder")
    if target.exists():
        shutil.rmtree(target)
    shutil.copytree(source, target, ignore=shutil.ignore_patterns(*_NOT_FLARE_S))


def add_site(folder: Path, name: str, config: Path) -> None:
    """Give a staged job one more site, which runs the other sites' algorithm.

    Args:
      folder: The staged job.
      name: The site's name, new to the job.
      config: The site's ``site.json``, or a folder that holds it or ``config/site.json``.

    Raises:
      ConfigError: If the name is taken or unusable, or there is no site.json.
    """
    apps = site_apps(folder)
    if not is_name(name):
        raise ConfigError(f"--add-site {name!r}: expected SITE=CONFIG with SITE of {NAME_EXPECTED}")
    if name in _RESERVED:
        raise ConfigError(f"--add-site {name}: {sorted(_RESERVED)} mean something else; choose another name")
    if name in apps:
        raise ConfigError(f"--add-site {name}: the job has this site already; its sites are {sorted(apps)}")
    candidates = (config, config / "site.json", config / "config" / "site.json")
    file = next((path for path in candidates if path.is_file()), None)
    if file is None:
        raise ConfigError(f"--add-site {name}={config}: no site.json there; see jobs/README.md for what it holds")
    read_json(file)  # here, for an error to name this file and not its copy
    own = folder / name / "config"
    own.mkdir(parents=True)
    shutil.copyfile(file, own / "site.json")
    first = next(iter(apps.values()))
    shutil.copyfile(folder / first / "config" / "config_fed_client.json", own / "config_fed_client.json")
    meta = read_json(folder / "meta.json")
    meta["deploy_map"][name] = [name]
    _write_meta(folder, meta)


def remove_site(folder: Path, name: str) -> None:
    """Take a site out of a staged job.

    Raises:
      ConfigError: If the job has no such site, or no other.
    """
    apps = site_apps(folder)
    if name not in apps or len(apps) == 1:
        raise ConfigError(f"--remove-site {name}: expected one of several sites of the job, which are {sorted(apps)}")
    meta = read_json(folder / "meta.json")
    del meta["deploy_map"][apps[name]]
    shutil.rmtree(folder / apps[name])
    _write_meta(folder, meta)


def _write_meta(folder: Path, meta: dict[str, Any]) -> None:
    sites = [site for app in meta["deploy_map"].values() for site in app if site != "server"]
    write_json(folder / "meta.json", {**meta, "min_clients": len(sites), "mandatory_clients": sites}, indent=2)


def apply_overrides(target: Path, overrides: Iterable[Override]) -> None:
    """Apply overrides to a staged job.

    Raises:
      ConfigError: If an override names an unknown target.
    """
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
    """The job's ``demo.json`` or None: ``cohort`` (data sets to generate), ``cuts`` of these, ``set`` (overrides)."""
    return _own_or_same_as(job, "demo.json")


def cohort_of(job: Path) -> dict[str, Any] | None:
    """The job's ``cohort.json``: how its sites' data sets are cut from those under ``nnUNet_raw``, or None."""
    return _own_or_same_as(job, "cohort.json")


def _own_or_same_as(job: Path, name: str) -> dict[str, Any] | None:
    """A file of the job; ``{"same_as": "OTHER"}`` in it takes another job's."""
    path = job / name
    if not path.exists():
        return None
    content = read_json(path)
    return read_json(find_job(job.parent, content["same_as"]) / name) if "same_as" in content else content


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
