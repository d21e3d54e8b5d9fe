"""Several methods side by side: ``python -m fedcmt.compare JOB... --seeds 3``.

Each job runs with each seed on the same data, splits and steps, in a process of its own; scores, paired differences,
bytes, time and memory become tables, a page and CSV files. Started again with the same ``--out`` it does what is left.
"""

import argparse
import json
import logging
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fedcmt.arguments import whole_number
from fedcmt.compare_jobs import (
    ComparisonError,
    Frame,
    StagedJob,
    adopt,
    federated,
    kept_threads,
    make_data,
    method_settings,
    parse_job,
    parse_variant,
    pooled,
    readable_settings,
    remember_settings,
    settings_hash,
    sites_of_test_cases,
    stage_methods,
)
from fedcmt.compare_runs import (
    Measured,
    PlannedRun,
    RunFailed,
    append_row,
    finished_row,
    is_finished,
    read_rows,
    run_all,
)
from fedcmt.file_lock import InUseError, exclusive
from fedcmt.job_folder import Override, parse_override
from fedcmt.json_file import read_json

_REPOSITORY = Path(__file__).resolve().parents[2]
_VERSIONS_OF = ("nvflare", "nnunetv2", "torch", "numpy", "scipy")


@dataclass(frozen=True)
class Prepared:
    """A comparison that is ready to run.

    Attributes:
      jobs: The staged jobs.
      runs: All runs, finished or not, seed by seed.
      raw: The folder of the data sets.
      site_of: Test case to site, for jobs of one site.
      threads: CPU threads per site.
    """

    jobs: list[StagedJob]
    runs: list[PlannedRun]
    raw: Path
    site_of: dict[str, str]
    threads: int


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = _parser().parse_args(given)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stdout)
    try:
        _compare(options, given)
    except (RunFailed, ValueError, OSError) as error:
        print(f"\nfedcmt.compare: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nfedcmt.compare: interrupted; finished runs are kept, start again to do the others", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fedcmt.compare", description="Run jobs on the same data, splits, seeds and steps, and compare."
    )
    parser.add_argument("jobs", nargs="*", metavar="JOB[=LABEL]", help="folders of jobs/, e.g. fedavg_brats=FedAvg")
    parser.add_argument(
        "--variant",
        action="append",
        default=[],
        metavar="LABEL=JOB[,algorithm.KEY=VALUE...]",
        help="a job once more with settings of its own",
    )
    parser.add_argument("--on", metavar="JOB", help="every algorithm on the sites, data and training settings of JOB")
    parser.add_argument("--reference", metavar="LABEL", help="differences are from this method; default: the first")
    seeds = parser.add_mutually_exclusive_group()
    seeds.add_argument("--seeds", type=whole_number(1), default=3, metavar="N", help="seeds 0 to N - 1; default 3")
    seeds.add_argument("--seed-list", type=whole_number(0), nargs="+", metavar="SEED", help="these seeds")
    parser.add_argument("--rounds", type=whole_number(1), help="rounds instead of the jobs'")
    parser.add_argument("--local-steps", type=whole_number(1), help="optimiser steps per round at every site")
    parser.add_argument(
        "--set", action="append", default=[], metavar="TARGET.KEY=VALUE", help="for every job that has the target"
    )
    parser.add_argument("--engine", choices=("inprocess", "simulator"), default="inprocess")
    parser.add_argument(
        "--threads", type=whole_number(1), help="CPU threads per site; default: as its finished runs, else the cores"
    )
    parser.add_argument("--parallel", type=whole_number(1), default=1, metavar="N", help="runs at a time; default 1")
    parser.add_argument("--demo", action="store_true", help="use the generated demo cohorts although nnUNet_raw is set")
    parser.add_argument("--out", type=Path, default=Path("workspace/compare"), help="default: workspace/compare")
    return parser


def _compare(options: argparse.Namespace, given: Sequence[str]) -> None:
    out = options.out.absolute()
    if _REPOSITORY / "jobs" in [out.resolve(), *out.resolve().parents]:
        raise ComparisonError(f"{out} is inside the job folders; give --out another folder")
    out.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        try:
            stack.enter_context(exclusive(out / ".lock"))
        except InUseError as error:
            raise ComparisonError(f"{out} is in use by another comparison; wait for it or give --out") from error
        prepared = _prepare(options, out)
        _run_missing(prepared, options, out)
        _report(prepared, options, given, out)


# ---------------------------------------------------------------------------------------------------------------------
# Before anything runs


def _prepare(options: argparse.Namespace, out: Path) -> Prepared:
    methods = [*map(parse_job, options.jobs), *map(parse_variant, options.variant)]
    if not methods:
        raise ComparisonError("no job given; name jobs of jobs/, or variants with --variant")
    labels = [method.label for method in methods]
    if options.reference is not None and options.reference not in labels:
        raise ComparisonError(f"--reference {options.reference}: expected one of {labels}")
    demo = options.demo or not os.environ.get("nnUNet_raw")
    frame = Frame(tuple(_overrides(options)), options.on, demo)
    staged = stage_methods(_REPOSITORY / "jobs", methods, frame, out / ".jobs")
    raw = make_data(staged, out / "nnUNet_raw")
    site_of = sites_of_test_cases(staged, raw)
    finished = {row["label"] for row in read_rows(out / "runs.csv")}
    kept = kept_threads(out / "settings.json") if finished else None
    threads = options.threads or kept or _fair_threads(options, staged)
    common = {"engine": options.engine, "threads": threads, "data": str(raw), "recipes": [j.recipe for j in staged[:1]]}
    common["sites"] = sorted(federated(staged)[0].config.sites)
    own = {job.method.label: method_settings(job) for job in staged}
    remember_settings(out / "settings.json", common, own, finished)
    jobs = adopt(staged, out / "jobs")
    hashes = {label: settings_hash(common, settings) for label, settings in own.items()}
    seeds = _seeds(options)
    runs = [_planned(job, seed, hashes[job.method.label], out) for seed in seeds for job in jobs]
    return Prepared(jobs, runs, raw, site_of, threads)


def _overrides(options: argparse.Namespace) -> list[Override]:
    pairs = (("server.num_rounds", options.rounds), ("sites.local_steps", options.local_steps))
    return [(key, value) for key, value in pairs if value is not None] + [parse_override(text) for text in options.set]


def _seeds(options: argparse.Namespace) -> list[int]:
    return list(dict.fromkeys(options.seed_list)) if options.seed_list else list(range(options.seeds))


def _fair_threads(options: argparse.Namespace, staged: Sequence[StagedJob]) -> int:
    """In one process sites take turns; in the simulator they run side by side."""
    beside = max(len(job.config.sites) for job in staged) if options.engine == "simulator" else 1
    return max(1, (os.cpu_count() or 1) // (options.parallel * beside))


def _planned(job: StagedJob, seed: int, settings: str, out: Path) -> PlannedRun:
    label = job.method.label
    return PlannedRun(label, job.method.job, seed, settings, job.config.folder, out / label / f"seed{seed}")


# ---------------------------------------------------------------------------------------------------------------------
# Running


def _run_missing(prepared: Prepared, options: argparse.Namespace, out: Path) -> None:
    table = out / "runs.csv"
    rows = read_rows(table)
    missing = [run for run in prepared.runs if not is_finished(run, rows)]
    print(
        f"{len(prepared.runs)} runs, {len(prepared.runs) - len(missing)} of them finished before; in {out}", flush=True
    )
    done = len(prepared.runs) - len(missing)

    def on_end(run: PlannedRun, measured: Measured) -> None:
        nonlocal done
        done += 1
        results = read_json(run.results)
        scores = _scores_of_run(prepared, run, results)
        append_row(table, finished_row(run, measured, results, scores))
        shown = ", ".join(f"{name} {value:.4f}" for name, value in scores.items() if name.endswith(" mean"))
        print(
            f"[{done}/{len(prepared.runs)}] {run.label}, seed {run.seed}: {shown}, {measured.seconds:.0f} s", flush=True
        )

    run_all(
        missing,
        on_end,
        engine=options.engine,
        threads=prepared.threads,
        environment={"nnUNet_raw": str(prepared.raw), "nnUNet_preprocessed": str(out / "preprocessed")},
        parallel=options.parallel,
    )


def _scores_of_run(prepared: Prepared, run: PlannedRun, results: Mapping[str, Any]) -> dict[str, float]:
    """Dice of every site that segments, accuracy of every site that classifies, and their means over sites."""
    # pandas is imported when there is a score to compute, not before the first run starts.
    from fedcmt.evaluation.comparison import run_scores, seed_means
    from fedcmt.evaluation.report import HEADLINES

    scores = run_scores(results, prepared.raw, _site_of(prepared, run)).assign(method=run.label, seed=run.seed)
    means = seed_means(scores).sort_values("site", kind="stable")
    rows = [row for metric in HEADLINES for row in means[means["metric"] == metric].itertuples()]
    return {f"{row.metric} {row.site}": round(float(row.value), 6) for row in rows}


def _site_of(prepared: Prepared, run: PlannedRun) -> dict[str, str] | None:
    """Where a run's test cases belong, if it is one of pooled data."""
    is_pooled = run.label in {job.method.label for job in pooled(prepared.jobs)}
    return prepared.site_of if is_pooled else None


# ---------------------------------------------------------------------------------------------------------------------
# The report


def _report(prepared: Prepared, options: argparse.Namespace, given: Sequence[str], out: Path) -> None:
    from fedcmt.evaluation.report import Comparison, MethodInfo, write_report

    one_site = {job.method.label for job in pooled(prepared.jobs)}
    methods = [
        MethodInfo(
            label=job.method.label,
            job=job.method.job,
            algorithm=job.config.algorithm["path"].rpartition(".")[2],
            pooled=job.method.label in one_site,
            settings=readable_settings(job),
        )
        for job in prepared.jobs
    ]
    tables = _collected(prepared, read_rows(out / "runs.csv"))
    comparison = Comparison(
        methods=methods,
        reference=options.reference or methods[0].label,
        seeds=_seeds(options),
        about=_about(prepared, options, given),
        **tables,
    )
    written = write_report(comparison, out)
    print("\n" + (out / "comparison.md").read_text(encoding="utf-8"))
    for path in (out / "runs.csv", *written):
        print(path)


def _collected(prepared: Prepared, rows: Sequence[Mapping[str, str]]) -> dict[str, Any]:
    """The runs' results as the tables of `fedcmt.evaluation.report.Comparison`."""
    import pandas as pd

    from fedcmt.evaluation.comparison import round_curves, run_scores, site_numbers

    parts: dict[str, list[pd.DataFrame]] = {key: [] for key in ("scores", "curves", "contribution", "cross_site")}
    for run in prepared.runs:
        results = read_json(run.results)
        log = (run.workspace / "server" / "rounds.jsonl").read_text(encoding="utf-8")
        of_run = {
            "scores": run_scores(results, prepared.raw, _site_of(prepared, run)),
            "curves": round_curves([json.loads(line) for line in log.splitlines()]),
            "contribution": site_numbers(results, "contribution"),
            "cross_site": site_numbers(results, "cross_site"),
        }
        for key, table in of_run.items():
            parts[key].append(table.assign(method=run.label, seed=run.seed))
    wanted = {(run.label, str(run.seed), run.settings) for run in prepared.runs}
    costs = pd.DataFrame([row for row in rows if (row["label"], row["seed"], row["settings"]) in wanted])
    costs = costs.rename(columns={"label": "method"}).drop_duplicates(["method", "seed"], keep="last")
    numbers = ["seconds", "peak_memory_mib", "bytes_sent", "bytes_received"]
    costs = costs[["method", "seed", *numbers]].astype(dict.fromkeys(numbers, float))
    return {key: pd.concat(tables, ignore_index=True) for key, tables in parts.items()} | {"costs": costs}


def _about(prepared: Prepared, options: argparse.Namespace, given: Sequence[str]) -> dict[str, str]:
    first = federated(prepared.jobs)[0].config
    steps = sorted({site.local_steps for site in first.sites.values()})
    return {
        "command": shlex.join(["python", "-m", "fedcmt.compare", *given]),
        "date": f"{datetime.now():%Y-%m-%d %H:%M}",
        "training": f"rounds {first.server.num_rounds}; steps per site and round {', '.join(map(str, steps))}",
        "data": str(prepared.raw),
        "runs": f"engine {options.engine}; CPU threads per site {prepared.threads}; runs at a time {options.parallel}",
        "versions": f"Python {sys.version.split()[0]}, "
        + ", ".join(f"{name} {version(name)}" for name in _VERSIONS_OF),
    }


if __name__ == "__main__":
    sys.exit(main())
