"""The launcher behind ``start_fl.sh``: from a job's name to trained models, a table and the next command.

``python -m fedcmt.run JOB [options]`` copies the job folder into the workspace with all overrides applied, sees to the
data, runs one of the engines, and prints what it found. It never writes to ``jobs/``.
"""

import argparse
import fcntl
import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from fedcmt.config import JobConfig, build_algorithm
from fedcmt.data.checks import DatasetError, find_dataset, read_dataset_json
from fedcmt.data.phantoms import make_cohort
from fedcmt.data.split import make_cuts
from fedcmt.evaluation.tables import results_table
from fedcmt.federation import FederationError
from fedcmt.flare.simulator import (
    SimulatorError,
    check_folder,
    child_environment,
    end_leftovers,
    run_simulator,
)
from fedcmt.job_folder import (
    Override,
    add_site,
    apply_overrides,
    cohort_of,
    demo_profile,
    find_job,
    parse_override,
    remove_site,
    stage,
)
from fedcmt.json_file import read_json, write_json
from fedcmt.logs import LAUNCHER_PREFIX
from fedcmt.workspace import GPUS_VARIABLE, RESUME_VARIABLE, THREADS_VARIABLE, WORKSPACE_VARIABLE, environment

REPOSITORY = Path(__file__).resolve().parents[2]
_NNUNET_VARIABLES = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")
_RUN_OUTPUTS = ("flare", "server", "sites", "tensorboard", "logs", "job", "results.json", "nnUNet_results")
_LEAST_FREE_BYTES = 500 * 2**20


class UserError(RuntimeError):
    """Something only the user can put right; shown as one message without a traceback."""


@dataclass(frozen=True)
class Run:
    """One resolved run.

    Attributes:
      job: The job folder under ``jobs/``.
      workspace: Where everything of this run goes.
      overrides: In order; later ones win.
      demo: The demo profile in use, or None.
      resume: Continue the run in the workspace, whose job folder and overrides stay.
    """

    job: Path
    workspace: Path
    overrides: list[Override]
    demo: dict[str, Any] | None
    resume: bool = False


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    options = _parser().parse_args(arguments)
    try:
        _run_all(options)
    except (UserError, FederationError, SimulatorError, ValueError, OSError) as error:
        print(f"\nstart_fl.sh: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstart_fl.sh: interrupted; everything it started has been ended", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="start_fl.sh", description="Train a federation of nnU-Nets.")
    parser.add_argument("job", help="a folder of jobs/, e.g. brats_sdl")
    parser.add_argument(
        "--engine", choices=("simulator", "inprocess"), default="simulator", help="what carries the messages"
    )
    parser.add_argument("--rounds", type=_positive, help="rounds instead of the job's")
    parser.add_argument("--local-steps", type=_positive, help="optimiser steps per round at every site")
    parser.add_argument("--seed", type=int, help="seed instead of the job's")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="TARGET.KEY=VALUE",
        help="any other value; TARGET is a site, sites, server or algorithm",
    )
    parser.add_argument("--gpus", help="GPU ids, e.g. 0,1; sites take turns on them")
    parser.add_argument("--threads", type=_positive, help="CPU threads per site; default: cores divided by sites")
    parser.add_argument("--workspace", type=Path, help="default: workspace/JOB")
    parser.add_argument("--demo", action="store_true", help="use the generated demo cohort although nnUNet_raw is set")
    parser.add_argument("--resume", action="store_true", help="continue the run in the workspace after its last round")
    parser.add_argument(
        "--add-site",
        action="append",
        default=[],
        metavar="SITE=CONFIG",
        help="with --resume: one more site joins; CONFIG is its site.json or the folder that holds it",
    )
    parser.add_argument(
        "--remove-site",
        action="append",
        default=[],
        metavar="SITE",
        help="with --resume: this site leaves; it keeps its files in the workspace and may be added again",
    )
    parser.add_argument(
        "--beside",
        metavar="JOB",
        help="afterwards run this one-site job with the same rounds, steps and seed, and show it beside",
    )
    parser.add_argument("-v", "--verbose", action="store_true", help="show everything FLARE writes")
    return parser


def _run_all(options: argparse.Namespace) -> None:
    run = _resolve(options, options.job, options.workspace)
    beside = _resolve(options, options.beside, None) if options.beside else None
    results = _run_one(run, options)
    _show(run, results)
    if beside is not None:
        other = _run_one(beside, options)
        if len(other["sites"]) != 1:
            raise UserError(f"--beside {options.beside}: expected a job of one site, it has {sorted(other['sites'])}")
        results["centralised"] = next(iter(other["sites"].values()))["test"]
        write_json(run.workspace / "results.json", results, indent=2)
        print()
        print(results_table(results), end="")


def _resolve(options: argparse.Namespace, name: str, workspace: Path | None) -> Run:
    job = find_job(REPOSITORY / "jobs", name)
    workspace = (workspace or Path("workspace") / job.name).absolute()
    if (REPOSITORY / "jobs") in workspace.resolve().parents:
        raise UserError(f"{workspace} is inside the job folders; give --workspace another folder")
    if options.engine == "simulator":
        check_folder(workspace)
    profile = demo_profile(job)
    raw_is_set = bool(os.environ.get("nnUNet_raw"))
    if options.demo and profile is None:
        raise UserError(f"job {name!r} has no demo profile (jobs/{name}/demo.json)")
    if not raw_is_set and profile is None:
        raise UserError(
            f"environment variable nnUNet_raw is not set, and job {name!r} has no demo cohort. Set it to the folder "
            "that holds your DatasetXXX_NAME folders; see README, 'Your own data'."
        )
    demo = profile if options.demo or not raw_is_set else None
    if (options.add_site or options.remove_site) and not options.resume:
        raise UserError("--add-site and --remove-site change a running federation: give --resume with them")
    overrides: list[Override] = list(demo["set"].items()) if demo and not options.resume else []
    for key, value in (
        ("server.num_rounds", options.rounds),
        ("sites.local_steps", options.local_steps),
        ("server.seed", options.seed),
    ):
        if value is not None:
            overrides.append((key, value))
    overrides += [parse_override(text) for text in options.set]
    return Run(job, workspace, overrides, demo, options.resume)


def _run_one(run: Run, options: argparse.Namespace) -> dict[str, Any]:
    run.workspace.mkdir(parents=True, exist_ok=True)
    with _exclusive(run.workspace):
        _check_disk(run.workspace)
        _announce(run, options)
        if options.resume:
            _check_resumable(run.workspace)
        staged = _stage(run, options)
        job = JobConfig.from_folder(staged)
        _check_before_anything_runs(job)
        source_raw = Path(os.environ["nnUNet_raw"]).absolute() if os.environ.get("nnUNet_raw") else None
        with environment(_environment(run, job, options)):
            _see_to_data(run, job, source_raw)
            # Only now that all is well: a typo must not move a finished run away.
            end_leftovers(run.workspace)
            if not options.resume:
                _set_aside_earlier_run(run.workspace)
            return _execute(run, _adopt(staged, run.workspace / "job"), options)


def _stage(run: Run, options: argparse.Namespace) -> Path:
    """The job as it is to run, beside the one in use: from ``jobs/``, or the run's own when it is resumed."""
    staged = run.workspace / ".job"
    stage(run.workspace / "job" if run.resume else run.job, staged)
    for name in options.remove_site:
        remove_site(staged, name)
    for text in options.add_site:
        name, _, config = text.partition("=")
        add_site(staged, name, Path(config))
    apply_overrides(staged, run.overrides)
    return staged


def _adopt(staged: Path, folder: Path) -> JobConfig:
    """Put the checked job folder in its place."""
    if folder.exists():
        shutil.rmtree(folder)
    staged.replace(folder)
    return JobConfig.from_folder(folder)


def _check_before_anything_runs(job: JobConfig) -> None:
    """Build the algorithm and read the planning options once, so that a typo shows before data are made."""
    from fedcmt.nnunet.planning_options import (
        PlanningOptions,  # imports nnU-Net, which takes seconds: only once all else is well
    )

    build_algorithm(job.algorithm)
    PlanningOptions.from_dict(job.server.planning)


def _execute(run: Run, job: JobConfig, options: argparse.Namespace) -> dict[str, Any]:
    started = time.monotonic()
    outcome = run.workspace / "server" / "results.json"
    outcome.unlink(missing_ok=True)
    (run.workspace / "server" / "failure.txt").unlink(missing_ok=True)
    if options.engine == "inprocess":
        results = _run_in_process(run, job, options)
    else:
        results = _run_in_simulator(run, job, options)
    results = {"job": results["job"], "engine": options.engine, **results}
    results["seconds"] = round(time.monotonic() - started, 1)
    for site in results["sites"].values():
        site["model_folder"] = str(Path(os.environ["nnUNet_results"]) / site["model_folder"])
    write_json(run.workspace / "results.json", results, indent=2)
    return results


def _run_in_process(run: Run, job: JobConfig, options: argparse.Namespace) -> dict[str, Any]:
    from fedcmt.inprocess import (
        run_in_process,
    )  # nnU-Net takes seconds to import; the simulator's launcher does without

    log = run.workspace / "logs" / "inprocess.log"
    _follow_in_process(log, options.verbose)
    try:
        return run_in_process(job, run.workspace, resume=options.resume)
    except FederationError as error:
        raise UserError(f"{error}\nAll that was logged is in {log}") from error


def _run_in_simulator(run: Run, job: JobConfig, options: argparse.Namespace) -> dict[str, Any]:
    def show(line: str) -> None:
        if line.startswith(LAUNCHER_PREFIX):
            print(line.removeprefix(LAUNCHER_PREFIX), flush=True)
        elif options.verbose:
            print(line, flush=True)

    failure, outcome = run.workspace / "server" / "failure.txt", run.workspace / "server" / "results.json"
    log = run.workspace / "logs" / "flare.log"
    try:
        run_simulator(
            job.folder,
            run.workspace / "flare",
            list(job.sites),
            environment=child_environment(REPOSITORY / "src", {}),
            log=log,
            on_line=show,
            all_sites_needed=job.server.min_sites in (None, len(job.sites)),
        )
    except SimulatorError as error:
        if failure.exists():
            raise UserError(f"{failure.read_text()}\nAll that was logged is in {log}") from error
        raise
    if not outcome.exists():
        reason = failure.read_text() if failure.exists() else "the job ended without results"
        raise UserError(f"{reason}\nAll that was logged is in {log}")
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


def _announce(run: Run, options: argparse.Namespace) -> None:
    if run.demo is not None:
        why = "--demo" if os.environ.get("nnUNet_raw") else "nnUNet_raw is not set"
        print(f"Demo profile jobs/{run.job.name}/demo.json ({why}): {run.demo['about']}", flush=True)
    print(f"Job {run.job.name}, engine {options.engine}, workspace {run.workspace}", flush=True)


def _environment(run: Run, job: JobConfig, options: argparse.Namespace) -> dict[str, str]:
    """What the engine's processes find in their environment, beyond this process's."""
    threads = options.threads or max(1, (os.cpu_count() or 1) // len(job.sites))
    values = {
        WORKSPACE_VARIABLE: str(run.workspace),
        RESUME_VARIABLE: "1" if options.resume else "0",
        THREADS_VARIABLE: str(threads),
        "OMP_NUM_THREADS": str(threads),
        "MALLOC_MMAP_THRESHOLD_": str(2**20),  # or glibc keeps the memory of uploads that are on disk by now
        GPUS_VARIABLE: json.dumps(_gpus_by_site(options, job)),
    }
    for variable in _NNUNET_VARIABLES:
        own_raw = variable == "nnUNet_raw" and (run.demo is not None or cohort_of(run.job) is not None)
        if own_raw or not os.environ.get(variable):
            values[variable] = str(run.workspace / variable)
        else:
            values[variable] = str(Path(os.environ[variable]).absolute())
    return values


def _gpus_by_site(options: argparse.Namespace, job: JobConfig) -> dict[str, str]:
    if not options.gpus:
        return {}
    if not torch.cuda.is_available():
        print(f"--gpus {options.gpus}: torch finds no CUDA device here; sites train on the CPU", flush=True)
        return {}
    gpus = options.gpus.split(",")
    if options.engine == "inprocess":
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus[0]  # one process trains on one GPU
        return {}
    return {site: gpus[index % len(gpus)] for index, site in enumerate(job.sites)}


def _see_to_data(run: Run, job: JobConfig, source_raw: Path | None) -> None:
    """Generate or cut the cohort if the job brings one, and see that every site's data set is there."""
    raw = Path(os.environ["nnUNet_raw"])
    if run.demo is not None:
        make_cohort(raw, run.demo["cohort"])
    elif (cohort := cohort_of(run.job)) is not None and source_raw is not None:
        make_cuts(source_raw, raw, cohort)
    problems = []
    for name, site in job.sites.items():
        try:
            read_dataset_json(find_dataset(raw, site.dataset_id))
        except DatasetError as error:
            problems.append(f"site {name!r}: {error}")
    if problems:
        raise DatasetError("\n".join(problems))


def _check_disk(workspace: Path) -> None:
    probe = workspace / ".writable"
    try:
        probe.write_bytes(b"\0" * 4096)
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"{workspace}: cannot be written to ({error.strerror}); give --workspace a folder on another disk"
        ) from error
    free = shutil.disk_usage(workspace).free
    if free < _LEAST_FREE_BYTES:
        raise UserError(
            f"{workspace}: {free / 2**20:.0f} MiB free on this disk, at least {_LEAST_FREE_BYTES / 2**20:.0f} needed"
        )


def _check_resumable(workspace: Path) -> None:
    if not ((workspace / "server" / "state.safetensors").exists() and (workspace / "job").is_dir()):
        raise UserError(f"--resume: {workspace} holds no run that finished a round; start without --resume")


def _set_aside_earlier_run(workspace: Path) -> None:
    """Move what an earlier run left to ``previous/<time>``: nothing is lost, and curves do not mix."""
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


@contextmanager
def _exclusive(workspace: Path) -> Iterator[None]:
    """One run at a time in a workspace; the lock goes with the process."""
    try:
        lock = (workspace / ".lock").open("a")
    except OSError as error:
        raise UserError(
            f"{workspace}: cannot be written to ({error.strerror}); give --workspace another folder"
        ) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"{workspace} is in use by another run; wait for it or give --workspace another folder"
            ) from error
        yield


def _show(run: Run, results: dict[str, Any]) -> None:
    """The table, where everything is, and the exact next command."""
    folders = [site["model_folder"] for site in results["sites"].values()]
    rows = [("Models", folder) for folder in folders]
    rows += [("Results", run.workspace / "results.json"), ("Logs", run.workspace / "logs")]
    rows += [("TensorBoard", f"tensorboard --logdir {run.workspace}")]
    rows += [("What left", run.workspace / "sites" / "SITE" / "egress.jsonl")]
    site = next(iter(results["sites"]))
    inference = f"{REPOSITORY / 'Inference.py'} --workspace {run.workspace} --clients app_{site} --gpu_ids 0"
    if results["sites"][site]["test"] is None:
        inference += " --input YOUR_IMAGES --output LABEL_MAPS"
    rows += [("Next", f"{_python()} {inference}")]
    print()
    print(results_table(results))
    for title, text in rows:
        print(f"{title:<12} {text}")


def _python() -> str:
    """The interpreter as the user can type it: plain ``python`` only where that is this one."""
    found = shutil.which("python")
    return "python" if found and Path(found).parent == Path(sys.executable).parent else sys.executable


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
