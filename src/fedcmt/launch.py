"""One run of a job: its folder staged in the workspace, its data seen to, an engine started, its results kept."""

import json
import logging
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from fedcmt.config import ConfigError, JobConfig
from fedcmt.data.checks import DatasetError, find_dataset, read_dataset_json
from fedcmt.data.phantoms import make_cohort
from fedcmt.data.split import dataset_names, make_cuts
from fedcmt.federation import FederationError
from fedcmt.file_lock import InUseError, exclusive
from fedcmt.fixed_settings import check_settings
from fedcmt.flare.poc import remove_kits, run_poc
from fedcmt.flare.processes import EngineError, end_workspace
from fedcmt.flare.simulator import run_simulator
from fedcmt.job_checks import check_job
from fedcmt.job_folder import Override, add_site, apply_overrides, cohort_of, remove_site, stage
from fedcmt.json_file import read_json, write_json
from fedcmt.logs import LAUNCHER_PREFIX
from fedcmt.privacy.server_half import LEDGER_FILE
from fedcmt.workspace import (
    GPUS_VARIABLE,
    MALLOC_VARIABLE,
    RESUME_VARIABLE,
    SOURCES,
    THREADS_VARIABLE,
    WORKSPACE_VARIABLE,
    child_environment,
    environment,
)

_NNUNET_VARIABLES = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")
_RUN_OUTPUTS = ("flare", "server", "sites", "tensorboard", "logs", "job", "results.json", "nnUNet_results")
_LEAST_FREE_BYTES = 500 * 2**20


class LaunchError(RuntimeError):
    """A run that failed or cannot begin; the message is for the user."""


@dataclass(frozen=True)
class Run:
    """One resolved run.

    Attributes:
      job: The job folder under ``jobs/``.
      workspace: Where everything of this run goes.
      engine: What carries the messages.
      overrides: In order; later ones win.
      demo: The demo profile in use, or None.
      resume: Continue the run in the workspace, whose job folder and overrides stay.
      add_sites: With ``resume``: names and configurations of sites that join.
      remove_sites: With ``resume``: sites that leave.
      gpus: GPU ids separated by commas, or None.
      threads: CPU threads per site; None divides the cores.
      verbose: Show everything FLARE writes.
    """

    job: Path
    workspace: Path
    engine: Literal["simulator", "poc", "inprocess"]
    overrides: list[Override]
    demo: dict[str, Any] | None
    resume: bool = False
    add_sites: tuple[tuple[str, Path], ...] = ()
    remove_sites: tuple[str, ...] = ()
    gpus: str | None = None
    threads: int | None = None
    verbose: bool = False


def launch(run: Run) -> dict[str, Any]:
    """Run a job and return its results, which are then also in the workspace's results.json.

    Raises:
      LaunchError: If the run failed or cannot begin; the message says why and which log to read.
      ConfigError, DatasetError: If the job or a data set is not usable; an earlier run is where it was then.
    """
    run.workspace.mkdir(parents=True, exist_ok=True)
    with _exclusive(run.workspace):
        _check_disk(run.workspace)
        _announce(run)
        if run.resume:
            _check_resumable(run)
        staged = _stage(run)
        job = _read_staged(run, staged)
        algorithm = check_job(job)
        if job.server.continues is not None:
            raise LaunchError("server.continues is for a provisioned network; --resume goes on with a run of this kind")
        if run.resume:
            check_settings(run.workspace / "server", job.server, algorithm)
        source_raw = Path(os.environ["nnUNet_raw"]).absolute() if os.environ.get("nnUNet_raw") else None
        with environment(_environment(run, job)):
            _see_to_data(run, job, source_raw)
            # Only now that all is well: a typo must not move a finished run away.
            end_workspace(str(run.workspace))
            if not run.resume:
                _set_aside_earlier_run(run.workspace)
            return _adopted(run, staged)


def checked(run: Run) -> JobConfig:
    """The job of a run that is to start later, checked as far as it can be without its data.

    Raises:
      ConfigError, FederationError, ValueError: As `launch`, before anything has begun.
    """
    with tempfile.TemporaryDirectory() as temporary:
        staged = Path(temporary) / "job"
        stage(run.job, staged)
        apply_overrides(staged, run.overrides)
        job = _read_staged(run, staged)
    check_job(job)
    return job


def export(run: Run, folder: Path) -> None:
    """Write a job as it is to run, for a network that is not ours to start; a demo's cohort goes into the workspace.

    Raises:
      LaunchError: If there is something else than a job at ``folder``.
      ConfigError, FederationError, ValueError: If the job is not usable; nothing is written then.
    """
    if folder.exists() and not (folder / "meta.json").is_file():
        raise LaunchError(f"--export {folder}: is there and is no job folder; name one that does not exist")
    checked(run)
    stage(run.job, folder)
    apply_overrides(folder, run.overrides)
    if run.demo is not None:
        _make_demo(run.demo, run.workspace / "nnUNet_raw")


def _stage(run: Run) -> Path:
    """The job as it is to run, beside the one in use: from ``jobs/``, or the run's own when it is resumed."""
    staged = run.workspace / ".job"
    stage(run.workspace / "job" if run.resume else run.job, staged)
    for name in run.remove_sites:
        remove_site(staged, name)
    for name, config in run.add_sites:
        add_site(staged, name, config)
    apply_overrides(staged, run.overrides)
    return staged


def _read_staged(run: Run, staged: Path) -> JobConfig:
    """The staged job. An error names the files that the user has, of which those staged are copies.

    Raises:
      ConfigError: If the job is not usable.
    """
    try:
        return JobConfig.from_folder(staged)
    except ConfigError as error:
        said = str(error)
        for name, config in run.add_sites:
            said = said.replace(str(staged / name / "config" / "site.json"), str(config))
        source = run.workspace / "job" if run.resume else run.job
        raise ConfigError(said.replace(str(staged), str(source))) from error


def _adopted(run: Run, staged: Path) -> dict[str, Any]:
    """Execute the checked job from its place in the workspace.

    A run that was to be resumed and ended before its state moved gets its own job folder back: a site that could not
    join is not part of it.
    """
    folder, before = run.workspace / "job", run.workspace / ".job_before"
    if before.exists():
        shutil.rmtree(before)
    if folder.exists():
        folder.replace(before)
    staged.replace(folder)
    state = _state_file(run.workspace)
    written = state.stat().st_mtime_ns if state.exists() else None
    try:
        return _execute(run, JobConfig.from_folder(folder))
    except BaseException:
        if run.resume and state.stat().st_mtime_ns == written:
            shutil.rmtree(folder)
            before.replace(folder)
        raise
    finally:
        if before.exists():
            shutil.rmtree(before)


def _execute(run: Run, job: JobConfig) -> dict[str, Any]:
    started = time.monotonic()
    outcome = run.workspace / "server" / "results.json"
    outcome.unlink(missing_ok=True)
    (run.workspace / "server" / "failure.txt").unlink(missing_ok=True)
    results = _run_in_process(run, job) if run.engine == "inprocess" else _run_in_flare(run, job)
    results = {"job": results["job"], "engine": run.engine, **results}
    results["seconds"] = round(time.monotonic() - started, 1)
    for site in results["sites"].values():
        site["model_folder"] = str(Path(os.environ["nnUNet_results"]) / site["model_folder"])
    write_json(run.workspace / "results.json", results, indent=2)
    return results


def _run_in_process(run: Run, job: JobConfig) -> dict[str, Any]:
    # nnU-Net takes seconds to import, and FLARE's launcher does without.
    from fedcmt.inprocess import run_in_process

    log = run.workspace / "logs" / "inprocess.log"
    _follow_in_process(log, run.verbose)
    try:
        return run_in_process(job, run.workspace, resume=run.resume)
    except FederationError as error:
        raise LaunchError(f"{error}\nAll that was logged is in {log}") from error


def _run_in_flare(run: Run, job: JobConfig) -> dict[str, Any]:
    def show(line: str) -> None:
        if line.startswith(LAUNCHER_PREFIX):
            print(line.removeprefix(LAUNCHER_PREFIX), flush=True)
        elif run.verbose:
            print(line, flush=True)

    failure, outcome = run.workspace / "server" / "failure.txt", run.workspace / "server" / "results.json"
    log = run.workspace / "logs" / "flare.log"
    engine = run_poc
    if run.engine == "simulator":
        engine = partial(run_simulator, all_sites_needed=job.server.min_sites in (None, len(job.sites)))
    try:
        engine(
            job.folder,
            run.workspace / "flare",
            list(job.sites),
            environment=child_environment(SOURCES, {}),
            log=log,
            on_line=show,
        )
    except EngineError as error:
        if failure.exists():
            raise LaunchError(f"{failure.read_text()}\nAll that was logged is in {log}") from error
        if _state_file(run.workspace).exists():
            raise LaunchError(f"{error}; --resume goes on after the last round that was finished") from error
        raise
    if not outcome.exists():
        reason = failure.read_text() if failure.exists() else "the job ended without results"
        raise LaunchError(f"{reason}\nAll that was logged is in {log}")
    return read_json(outcome)


def _follow_in_process(log: Path, verbose: bool) -> None:
    """Log lines to the terminal; all of them, with tracebacks, to a file."""
    log.parent.mkdir(parents=True, exist_ok=True)
    package = logging.getLogger("fedcmt")
    package.setLevel(logging.DEBUG)
    terminal, file = logging.StreamHandler(sys.stdout), logging.FileHandler(log, mode="w")
    terminal.setLevel(logging.DEBUG if verbose else logging.INFO)
    package.handlers = [terminal, file]
    for handler in package.handlers:
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname).1s %(message)s", "%H:%M:%S"))


def _announce(run: Run) -> None:
    if run.demo is not None:
        why = "--demo" if os.environ.get("nnUNet_raw") else "nnUNet_raw is not set"
        print(f"Demo profile jobs/{run.job.name}/demo.json ({why}): {run.demo['about']}", flush=True)
    print(f"Job {run.job.name}, engine {run.engine}, workspace {run.workspace}", flush=True)


def _environment(run: Run, job: JobConfig) -> dict[str, str]:
    """What the engine's processes find in their environment, beyond this process's."""
    threads = run.threads or max(1, (os.cpu_count() or 1) // len(job.sites))
    values = {
        WORKSPACE_VARIABLE: str(run.workspace),
        RESUME_VARIABLE: "1" if run.resume else "0",
        THREADS_VARIABLE: str(threads),
        "OMP_NUM_THREADS": str(threads),
        MALLOC_VARIABLE: str(2**20),
        GPUS_VARIABLE: json.dumps(_gpus_by_site(run, job)),
    }
    for variable in _NNUNET_VARIABLES:
        own_raw = variable == "nnUNet_raw" and (run.demo is not None or _cohort_in_use(run, job) is not None)
        if own_raw or not os.environ.get(variable):
            values[variable] = str(run.workspace / variable)
        else:
            values[variable] = str(Path(os.environ[variable]).absolute())
    return values


def _gpus_by_site(run: Run, job: JobConfig) -> dict[str, str]:
    if not run.gpus:
        return {}
    if not torch.cuda.is_available():
        print(f"--gpus {run.gpus}: torch finds no CUDA device here; sites train on the CPU", flush=True)
        return {}
    gpus = run.gpus.split(",")
    if run.engine == "inprocess":
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus[0]  # one process trains on one GPU
        return {}
    return {site: gpus[index % len(gpus)] for index, site in enumerate(job.sites)}


def _see_to_data(run: Run, job: JobConfig, source_raw: Path | None) -> None:
    """Generate or cut the cohort if the job brings one, and see that every site's data set is there."""
    raw = Path(os.environ["nnUNet_raw"])
    if run.demo is not None:
        _make_demo(run.demo, raw)
    elif (cohort := _cohort_in_use(run, job)) is not None and source_raw is not None:
        make_cuts(source_raw, raw, cohort)
    if source_raw == raw:
        source_raw = None  # sites look there already
    if source_raw is not None:
        _link_own_data(raw, source_raw, {site.dataset_id for site in job.sites.values()})
    problems = []
    for name, site in job.sites.items():
        try:
            read_dataset_json(find_dataset(raw, site.dataset_id))
        except DatasetError as error:
            problems.append(f"site {name!r}: {error}")
    if problems:
        if source_raw is not None:
            problems.append(f"{raw} holds the job's cohort; nnUNet_raw={source_raw} was searched as well.")
        raise DatasetError("\n".join(problems))


def _link_own_data(raw: Path, source_raw: Path, dataset_ids: Collection[int]) -> None:
    """Put beside a job's cohort, as links, the data sets of its sites that are the user's own."""
    for dataset_id in dataset_ids:
        found = list(raw.glob(f"Dataset{dataset_id:03d}_*"))
        if any(not folder.is_symlink() for folder in found):
            continue  # of the cohort
        for link in found:  # an earlier run's, perhaps to another nnUNet_raw
            link.unlink()
        for folder in source_raw.glob(f"Dataset{dataset_id:03d}_*"):
            (raw / folder.name).symlink_to(folder)


def _make_demo(demo: dict[str, Any], raw: Path) -> None:
    make_cohort(raw, demo["cohort"])
    if cuts := demo.get("cuts"):
        make_cuts(raw, raw, {"cuts": cuts})


def _cohort_in_use(run: Run, job: JobConfig) -> dict[str, Any] | None:
    """The job's cohort, unless every site has been given a data set that is not of it."""
    cohort = cohort_of(run.job)
    if cohort is None:
        return None
    made = {int(name[7:10]) for name in dataset_names(cohort)}
    return cohort if made & {site.dataset_id for site in job.sites.values()} else None


def _check_disk(workspace: Path) -> None:
    probe = workspace / ".writable"
    try:
        probe.write_bytes(b"\0" * 4096)
        probe.unlink()
    except OSError as error:
        raise LaunchError(
            f"{workspace}: cannot be written to ({error.strerror}); give --workspace a folder on another disk"
        ) from error
    free = shutil.disk_usage(workspace).free
    if free < _LEAST_FREE_BYTES:
        raise LaunchError(
            f"{workspace}: {free / 2**20:.0f} MiB free on this disk, at least {_LEAST_FREE_BYTES / 2**20:.0f} needed"
        )


def _check_resumable(run: Run) -> None:
    if not (_state_file(run.workspace).exists() and (run.workspace / "job").is_dir()):
        raise LaunchError(f"--resume: {run.workspace} holds no run that finished a round; start without --resume")
    asked, held = (str(read_json(folder / "meta.json").get("name")) for folder in (run.job, run.workspace / "job"))
    if asked != held:
        raise LaunchError(
            f"--resume: {run.workspace} holds a run of job {held!r}, not of {asked!r}; resume {held!r}, or give "
            "--workspace another folder"
        )


def _state_file(workspace: Path) -> Path:
    return workspace / "server" / "state.safetensors"


def _set_aside_earlier_run(workspace: Path) -> None:
    """Move what an earlier run left to ``previous/`` beside the workspace: nothing is lost, and curves do not mix."""
    remove_kits(workspace / "flare")  # of a launcher that was killed
    found = [workspace / name for name in _RUN_OUTPUTS if (workspace / name).exists()]
    if not any(path.name in ("results.json", "server", "sites") for path in found):
        return
    target = workspace.parent / "previous" / f"{workspace.name}-{datetime.now():%Y%m%d-%H%M%S}"
    target.mkdir(parents=True)
    for path in found:
        path.replace(target / path.name)
    if (results := target / "results.json").exists():  # its models have moved with it
        models = str(workspace / "nnUNet_results")
        results.write_text(results.read_text().replace(models, str(target / "nnUNet_results")))
    print(f"An earlier run's outputs moved to {target}", flush=True)
    if spent := _epsilon_spent(target / "server" / LEDGER_FILE):
        print(f"It spent epsilon {spent:.3f}, which adds to what this run spends on the same cases", flush=True)


def _epsilon_spent(ledger: Path) -> float | None:
    """The last epsilon in an earlier run's privacy ledger, if it has one that can be read."""
    if not ledger.is_file():
        return None
    try:
        return json.loads(ledger.read_text().splitlines()[-1]).get("epsilon_after")
    except ValueError:
        return None


@contextmanager
def _exclusive(workspace: Path) -> Iterator[None]:
    """One run at a time in a workspace."""
    with ExitStack() as stack:
        try:
            stack.enter_context(exclusive(workspace / ".lock"))
        except InUseError as error:
            raise LaunchError(
                f"{workspace} is in use by another run; wait for it or give --workspace another folder"
            ) from error
        except OSError as error:
            raise LaunchError(
                f"{workspace}: cannot be written to ({error.strerror}); give --workspace another folder"
            ) from error
        yield
