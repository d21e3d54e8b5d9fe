"""The launcher behind ``start_fl.sh``: from a job's name to trained models, a table and the next command.

``python -m fedcmt.run JOB [options]`` copies the job folder into the workspace with all overrides applied, sees to the
data, runs one of the engines, and prints what it found. It never writes to ``jobs/``.
"""

import argparse
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fedcmt.arguments import whole_number
from fedcmt.config import site_apps
from fedcmt.evaluation.tables import learning_line, results_table
from fedcmt.federation import FederationError
from fedcmt.flare.processes import Ended, EngineError, check_folder, ending_on_signals
from fedcmt.job_folder import Override, demo_profile, find_job, parse_override
from fedcmt.json_file import write_json
from fedcmt.launch import LaunchError, Run, checked, export, launch

REPOSITORY = Path(__file__).resolve().parents[2]


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    options = _parser().parse_args(arguments)
    try:
        with ending_on_signals():
            _run_all(options)
    except (LaunchError, FederationError, EngineError, ValueError, OSError) as error:
        print(f"\nstart_fl.sh: {error}", file=sys.stderr)
        return 1
    except (KeyboardInterrupt, Ended) as signalled:
        what = "everything it started has been ended; if a round was finished, --resume goes on after it"
        print(f"\nstart_fl.sh: interrupted; {what}", file=sys.stderr)
        return signalled.code if isinstance(signalled, Ended) else 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="start_fl.sh", description="Train a federation of nnU-Nets.")
    parser.add_argument("job", help="a folder of jobs/, e.g. brats_sdl")
    parser.add_argument(
        "--engine",
        choices=("simulator", "poc", "inprocess"),
        default="simulator",
        help="what carries the messages: FLARE's simulator, a FLARE server and clients on this machine, or nothing",
    )
    parser.add_argument("--rounds", type=whole_number(1), help="rounds instead of the job's")
    parser.add_argument("--local-steps", type=whole_number(1), help="optimiser steps per round at every site")
    parser.add_argument("--seed", type=int, help="seed instead of the job's")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="TARGET.KEY=VALUE",
        help="any other value; TARGET is a site, sites, server or algorithm",
    )
    parser.add_argument("--gpus", help="GPU ids, e.g. 0,1; sites take turns on them")
    parser.add_argument("--threads", type=whole_number(1), help="CPU threads per site; default: cores divided by sites")
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
    parser.add_argument(
        "--export",
        type=Path,
        metavar="FOLDER",
        help="start nothing: write the job with these settings there, for a provisioned network (docs/deployment.md)",
    )
    parser.add_argument("-v", "--verbose", action="store_true", help="show everything FLARE writes")
    return parser


def _run_all(options: argparse.Namespace) -> None:
    run = _resolve(options, options.job, options.workspace)
    if options.export:
        export(run, options.export)
        print(f"Job {run.job.name} for a provisioned network: {options.export}")
        if run.demo is not None:
            print(f"Its demo cohort: {run.workspace / 'nnUNet_raw'}")
        return
    beside = _beside(options) if options.beside else None
    results = launch(run)
    _show(run, results)
    if beside is not None:
        other = launch(beside)
        results["centralised"] = next(iter(other["sites"].values()))["test"]
        write_json(run.workspace / "results.json", results, indent=2)
        print()
        print(results_table(results), end="")


def _beside(options: argparse.Namespace) -> Run:
    """The one-site job to run afterwards, checked now; of ``--set`` it gets neither the other job's sites nor its
    algorithm."""
    run = _resolve(options, options.beside, None)
    targets = {"server", "sites", *site_apps(run.job)}
    run = replace(run, overrides=[(key, value) for key, value in run.overrides if key.split(".")[0] in targets])
    sites = sorted(checked(run).sites)
    if len(sites) != 1:
        raise LaunchError(f"--beside {options.beside}: expected a job of one site, it has {sites}")
    return run


def _resolve(options: argparse.Namespace, name: str, workspace: Path | None) -> Run:
    job = find_job(REPOSITORY / "jobs", name)
    workspace = (workspace or Path("workspace") / job.name).absolute()
    if (REPOSITORY / "jobs") in workspace.resolve().parents:
        raise LaunchError(f"{workspace} is inside the job folders; give --workspace another folder")
    if options.engine != "inprocess":
        check_folder(workspace)
    profile = demo_profile(job)
    raw_is_set = bool(os.environ.get("nnUNet_raw"))
    if options.demo and profile is None:
        raise LaunchError(f"job {name!r} has no demo profile (jobs/{name}/demo.json)")
    if not (raw_is_set or options.export) and profile is None:
        raise LaunchError(
            f"environment variable nnUNet_raw is not set, and job {name!r} has no demo cohort. Set it to the folder "
            "that holds your DatasetXXX_NAME folders; see README, 'Your own data'."
        )
    demo = profile if options.demo or not (raw_is_set or options.export) else None
    if options.export and (options.resume or options.beside):
        raise LaunchError("--export writes a job and runs none: leave out --resume and --beside")
    if options.export and (REPOSITORY / "jobs") in options.export.resolve().parents:
        raise LaunchError(f"--export {options.export}: is inside the job folders, which nothing writes to")
    if (options.add_site or options.remove_site) and not options.resume:
        raise LaunchError("--add-site and --remove-site change a running federation: give --resume with them")
    overrides: list[Override] = list(demo["set"].items()) if demo and not options.resume else []
    for key, value in (
        ("server.num_rounds", options.rounds),
        ("sites.local_steps", options.local_steps),
        ("server.seed", options.seed),
    ):
        if value is not None:
            overrides.append((key, value))
    overrides += [parse_override(text) for text in options.set]
    return Run(
        job,
        workspace,
        options.engine,
        overrides,
        demo,
        resume=options.resume,
        add_sites=tuple(_name_and_config(text) for text in options.add_site),
        remove_sites=tuple(options.remove_site),
        gpus=options.gpus,
        threads=options.threads,
        verbose=options.verbose,
    )


def _name_and_config(text: str) -> tuple[str, Path]:
    name, equals, config = text.partition("=")
    if not (equals and config):
        raise LaunchError(f"--add-site {text!r}: expected SITE=CONFIG, e.g. site5=my_site/site.json")
    return name, Path(config)


def _show(run: Run, results: dict[str, Any]) -> None:
    """The table, where everything is, and the exact next command."""
    folders = [site["model_folder"] for site in results["sites"].values()]
    rows = [("Models", folder) for folder in folders]
    rows += [("Results", run.workspace / "results.json"), ("Logs", run.workspace / "logs")]
    rows += [("TensorBoard", f"tensorboard --logdir {run.workspace}")]
    rows += [("What left", run.workspace / "sites" / "SITE" / "egress.jsonl")]
    site = next(iter(results["sites"]))
    inference = f"{REPOSITORY / 'Inference.py'} --workspace {run.workspace} --clients {site}"
    if torch.cuda.is_available():
        inference += " --gpu_ids 0"
    if results["sites"][site]["test"] is None:
        inference += " --input YOUR_IMAGES --output LABEL_MAPS"
    rows += [("Next", f"{_python()} {inference}")]
    print()
    print(results_table(results))
    if line := learning_line(results):
        print(f"Validation patches, untrained -> trained: {line}\n")
    for title, text in rows:
        print(f"{title:<12} {text}")


def _python() -> str:
    """The interpreter as the user can type it: plain ``python`` only where that is this one."""
    found = shutil.which("python")
    return "python" if found and Path(found).parent == Path(sys.executable).parent else sys.executable


if __name__ == "__main__":
    sys.exit(main())
