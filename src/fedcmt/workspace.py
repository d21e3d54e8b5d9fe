"""Where a run keeps things, the same in every engine.

``workspace/JOB/`` holds ``job/`` (the materialised job folder), ``server/`` and ``sites/<site>/`` (state, ledger),
``flare/`` (FLARE's own folder, which its simulator wipes), ``logs/``, ``results.json`` and, unless nnU-Net's variables
say otherwise, nnU-Net's folders. The launcher names the folder to its child processes in ``FEDCMT_WORKSPACE``.
"""

import json
import os
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

WORKSPACE_VARIABLE = "FEDCMT_WORKSPACE"
RESUME_VARIABLE = "FEDCMT_RESUME"
GPUS_VARIABLE = "FEDCMT_GPUS"
THREADS_VARIABLE = "FEDCMT_THREADS"
MALLOC_VARIABLE = "MALLOC_MMAP_THRESHOLD_"
"""From how many bytes on the C library gives a block back to the system at once. The server needs that, or it keeps the
memory of uploads that are on disk by now; a process that trains must not have it, as each step would pay for its
blocks with page faults, up to half of its time."""
SOURCES = Path(__file__).resolve().parents[1]
"""The folder that holds this package."""


def workspace_folder(flare_root: str, job_id: str, continues: str | None = None) -> Path:
    """The run's folder: the launcher's, or, in a network without a launcher, one below FLARE's root for the federation.

    Args:
      flare_root: Folder of the startup kit.
      job_id: FLARE's id of the job that runs.
      continues: FLARE's id of the job that began the federation, where that is another one.

    Raises:
      ValueError: If an id that is to name a folder is not of FLARE's form.
    """
    if continues is not None and not is_job_id(continues):
        raise ValueError(f"continues is {continues!r}, expected the id that FLARE gave to a job")
    if named := os.environ.get(WORKSPACE_VARIABLE):
        return Path(named)
    if not is_job_id(job_id):
        raise ValueError(f"job id is {job_id!r}, expected one of FLARE's form: it names a folder")
    return Path(flare_root) / "fedcmt" / (continues or job_id)


def is_job_id(value: object) -> bool:
    """Whether it is of the form of FLARE's ids, UUIDs, and so names a folder beside others and nothing else."""
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", value) is not None


def is_resuming() -> bool:
    """Whether the launcher asked to continue an earlier run."""
    return os.environ.get(RESUME_VARIABLE) == "1"


def use_assigned_gpu(site: str) -> None:
    """Show this process only the GPU the launcher gave to the site; nnU-Net always trains on the first one it sees."""
    gpus = json.loads(os.environ.get(GPUS_VARIABLE, "{}"))
    if site in gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(gpus[site])


def nnunet_folder(variable: str) -> Path:
    """One of nnU-Net's folders, by its environment variable.

    Raises:
      OSError: If the variable is not set.
    """
    if not os.environ.get(variable):
        raise OSError(
            f"environment variable {variable} is not set; it names nnU-Net's folder. See README, 'Your own data'; a "
            "site of a provisioned network may name it in local/fedcmt_site.json instead."
        )
    return Path(os.environ[variable])


@contextmanager
def environment(values: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables, and put back afterwards what was there before."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def child_environment(package_root: Path, extra: Mapping[str, str], without: Collection[str] = ()) -> dict[str, str]:
    """This process's environment for a child, with the package of that folder importable, and ``extra`` in it.

    Args:
      package_root: Folder that holds the package.
      extra: Further variables.
      without: Variables that the child is not to have.
    """
    own = {name: value for name, value in os.environ.items() if name not in without}
    paths = [str(package_root), *filter(None, own.get("PYTHONPATH", "").split(os.pathsep))]
    return {**own, "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths)), **extra}
