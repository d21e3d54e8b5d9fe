"""Checks of the machine a site runs on: folders, disk, memory, processors, packages and the way to the server."""

import os
import shutil
import socket
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import psutil
import torch
from packaging.requirements import Requirement

from fedcmt.doctor.findings import Finding, ok, problem, readable_bytes, some, warning

VARIABLES = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")
_LEAST_PYTHON = (3, 11)
_LEAST_FREE_BYTES = 500 * 2**20  # the launcher starts nothing with less
_REQUIREMENTS = Path(__file__).resolve().parents[3] / "requirements.txt"


@dataclass(frozen=True)
class DiskNeed:
    """What a folder will have to take.

    Attributes:
      what: E.g. "nnUNet_preprocessed".
      folder: Need not exist yet.
      needed_bytes: Of new files; 0 where that is not known.
    """

    what: str
    folder: Path
    needed_bytes: int = 0


def machine_findings() -> list[Finding]:
    """Python, its packages and the processors."""
    return [python_finding(), *package_findings(required_packages()), cpu_finding()]


def folder_findings(workspace: Path | None, dataset: Path | None) -> list[Finding]:
    """nnU-Net's variables, and whether what they name can be read and written.

    Args:
      workspace: The run's folder; None if it is not known.
      dataset: The data set under ``nnUNet_raw``; None if there is none.
    """
    found = [_variable_finding(name) for name in VARIABLES]
    if workspace is not None:
        found.append(_writable_finding("workspace", workspace))
    if dataset is not None:
        found += _clash_findings(dataset)
    return found


def _variable_finding(name: str) -> Finding:
    value = os.environ.get(name)
    if not value and name == "nnUNet_raw":
        return problem(name, "is not set", "the folder that holds DatasetXXX_Name", "export nnUNet_raw=/your/folder")
    if not value:
        remedy = "start_fl.sh then uses a folder in the workspace; in a network of FLARE sites, set it"
        return warning(name, "is not set", "a folder", f"{remedy}.")
    folder = Path(value)
    if name != "nnUNet_raw":
        return _writable_finding(name, folder)
    if not (folder.is_dir() and os.access(folder, os.R_OK | os.X_OK)):
        return problem(name, f"{folder} cannot be read", "a folder with DatasetXXX_Name", "Correct the variable.")
    return ok(name, str(folder))


def _writable_finding(what: str, folder: Path) -> Finding:
    existing = _existing(folder)
    try:
        with tempfile.NamedTemporaryFile(dir=existing):  # permission bits do not tell of read-only mounts
            pass
    except OSError as error:
        remedy = "Give this user the right to write there, or name another folder."
        return problem(what, f"{folder} cannot be written: {error.strerror}", "a folder to write to", remedy)
    return ok(what, str(folder) if existing == folder else f"{folder} (will be made)")


def _clash_findings(dataset: Path) -> list[Finding]:
    """Data sets of this one's id and another name in nnU-Net's other folders."""
    prefix = dataset.name.partition("_")[0] + "_"
    found = []
    for name in VARIABLES[1:]:
        folder = Path(os.environ.get(name) or "/nonexistent")
        others = sorted(p.name for p in folder.glob(f"{prefix}*") if p.name != dataset.name)
        if others:
            remedy = "nnU-Net's own commands stop at this: rename or move them."
            found.append(warning("names", f"{name} holds {some(others)}", f"only {dataset.name} of that id", remedy))
    return found


def disk_findings(needs: Sequence[DiskNeed]) -> list[Finding]:
    """Free space of each disk against all that will be written to it."""
    disks: dict[int, list[DiskNeed]] = defaultdict(list)
    for need in needs:
        disks[_existing(need.folder).stat().st_dev].append(need)
    return [_disk_finding(on_it) for on_it in disks.values()]


def _disk_finding(needs: Sequence[DiskNeed]) -> Finding:
    free = shutil.disk_usage(_existing(needs[0].folder)).free
    needed = sum(need.needed_bytes for need in needs)
    found = f"{readable_bytes(free)} free for {', '.join(need.what for need in needs)}"
    if free < max(needed, _LEAST_FREE_BYTES):
        expected = f"{readable_bytes(max(needed, _LEAST_FREE_BYTES))} or more"
        return problem("disk", found, expected, "Make room, or set the variables to a larger disk.")
    if free < 2 * needed:
        expected = f"twice the forecast of {readable_bytes(needed)}"
        return warning("disk", found, expected, "Keep an eye on it: predictions and logs come on top.")
    return ok("disk", found + (f", forecast {readable_bytes(needed)}" if needed else ""))


def memory_findings(needed_bytes: int | None) -> list[Finding]:
    """Free main memory; against what training needs on the CPU, if that is known."""
    available = psutil.virtual_memory().available
    return [_memory_finding("memory", available, needed_bytes)]


def gpu_findings(device: str, needed_bytes: int | None) -> list[Finding]:
    """The GPU the site would train on.

    Args:
      device: The site's setting: "auto", "cpu" or "cuda".
      needed_bytes: GPU memory that training needs; None if that is not known.
    """
    if device == "cpu":
        return [ok("GPU", "not used: the site's device is cpu")]
    if not torch.cuda.is_available():
        remedy = "Check nvidia-smi and that torch is a CUDA build; without a GPU the forecast is for the CPU."
        make = problem if device == "cuda" else warning
        return [make("GPU", "torch sees none", "a CUDA GPU", remedy)]
    free, total = torch.cuda.mem_get_info()
    name = f"{torch.cuda.get_device_name()}, {readable_bytes(total)}"
    return [ok("GPU", name), _memory_finding("GPU memory", free, needed_bytes)]


def _memory_finding(topic: str, available: int, needed: int | None) -> Finding:
    found = f"{readable_bytes(available)} available"
    if needed is None:
        return ok(topic, found)
    if available < needed:
        remedy = "Free memory, or lower planning.batch_size or planning.max_patch_size for the whole job."
        return problem(topic, found, f"{readable_bytes(needed)} or more", remedy)
    return ok(topic, f"{found}, forecast {readable_bytes(needed)}")


def cpu_finding() -> Finding:
    """Processor cores this process may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if cores < 2:
        return warning("CPU", "1 core", "2 or more", "Loading and training will wait for each other.")
    return ok("CPU", f"{cores} cores")


def python_finding() -> Finding:
    """The interpreter's version."""
    version = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info[:2] < _LEAST_PYTHON:
        least = ".".join(map(str, _LEAST_PYTHON))
        return problem("Python", version, f"{least} or newer", "Make the environment with a newer interpreter.")
    return ok("Python", version)


def required_packages() -> list[str]:
    """The lines of requirements.txt; for an installed package, what its metadata says."""
    if _REQUIREMENTS.is_file():
        lines = (line.partition("#")[0].strip() for line in _REQUIREMENTS.read_text().splitlines())
        return [line for line in lines if line]
    return [line for line in metadata.requires("fedcmt") or [] if "extra ==" not in line]


def package_findings(requirements: Sequence[str]) -> list[Finding]:
    """Missing packages and those of other versions; the adapters to nnU-Net and FLARE rely on exact ones."""
    wrong = []
    for line in requirements:
        requirement = Requirement(line)
        installed = _installed_version(requirement.name)
        if installed is None:
            wrong.append(f"{requirement.name} is missing")
        elif not requirement.specifier.contains(installed, prereleases=True):
            wrong.append(f"{requirement.name} {installed} is not {requirement.specifier}")
    if wrong:
        remedy = "Run: pip install -r requirements.txt"
        return [problem("packages", some(wrong, 8), "the versions in requirements.txt", remedy)]
    return [ok("packages", f"all {len(requirements)} of requirements.txt")]


def _installed_version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def parse_server(text: str) -> tuple[str, int]:
    """``HOST:PORT`` or ``[IPv6]:PORT``.

    Raises:
      ValueError: If it is neither.
    """
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ValueError(f"{text!r} is not HOST:PORT with a port from 1 to 65535")
    return host.removeprefix("[").removesuffix("]"), int(port)


def server_finding(host: str, port: int, timeout_seconds: float = 5.0) -> Finding:
    """Whether a TCP connection to the FLARE server opens; certificates are FLARE's to check."""
    started = time.monotonic()
    try:
        socket.create_connection((host, port), timeout=timeout_seconds).close()
    except OSError as error:
        reason = error.strerror or str(error) or type(error).__name__
        remedy = "Ask for outgoing TCP to that port in the firewall, and whether the server is up."
        return problem("network", f"{host}:{port} is not reached: {reason}", "a TCP connection", remedy)
    return ok("network", f"{host}:{port} answers in {1000 * (time.monotonic() - started):.0f} ms (TCP; TLS not tried)")


def workspace_needs(workspace: Path | None, needed: Mapping[str, int]) -> list[DiskNeed]:
    """Each of nnU-Net's folders and the workspace with the bytes it will take; unset ones lie in the workspace."""
    needs = []
    for name in (*VARIABLES, "workspace"):
        value = os.environ.get(name) if name != "workspace" else None
        folder = Path(value) if value else workspace
        if folder is not None:
            needs.append(DiskNeed(name, folder, needed.get(name, 0)))
    return needs


def _existing(folder: Path) -> Path:
    """The folder or its nearest parent that exists."""
    folder = folder.absolute()
    return next(path for path in (folder, *folder.parents) if path.exists())
