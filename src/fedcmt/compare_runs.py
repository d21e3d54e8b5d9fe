"""The runs of a comparison: each in a process of its own, measured, and recorded in ``runs.csv`` as it ends.

``python -m fedcmt.compare_runs --job FOLDER --workspace FOLDER --seed N ...`` is such a process.
"""

import _thread
import argparse
import csv
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from fedcmt.launch import Run, launch
from fedcmt.workspace import SOURCES, child_environment

logger = logging.getLogger(__name__)

_MEBIBYTE = 2**20
_MAXRSS_UNIT = 1 if sys.platform == "darwin" else 1024
Engine = Literal["inprocess", "simulator"]


class RunFailed(RuntimeError):
    """A run that ended with an error; the message names it and its log."""


@dataclass(frozen=True)
class PlannedRun:
    """One run of one method.

    Attributes:
      label: The method's.
      job: The job of ``jobs/`` that the method is.
      seed: The run's.
      settings: `fedcmt.compare_jobs.settings_hash` of what it runs with.
      folder: The staged job folder.
      workspace: Where everything of the run goes.
    """

    label: str
    job: str
    seed: int
    settings: str
    folder: Path
    workspace: Path

    @property
    def log(self) -> Path:
        """What the run's process prints."""
        return self.workspace.with_suffix(".log")

    @property
    def results(self) -> Path:
        """The results of a finished run."""
        return self.workspace / "results.json"


@dataclass(frozen=True)
class Measured:
    """What a run took.

    Attributes:
      seconds: Wall time of its process, from its start to its end.
      peak_memory_mib: Most resident memory that one process of it held at a time, in MiB.
    """

    seconds: float
    peak_memory_mib: float


# ---------------------------------------------------------------------------------------------------------------------
# runs.csv


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of finished runs; a last line that was cut off as it was written is taken away.

    Raises:
      ValueError: If a row does not fit the header.
    """
    if not path.exists():
        return []
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        with path.open("r+b") as file:
            file.truncate(len(whole))
    rows = list(csv.DictReader(whole.decode("utf-8").splitlines()))
    for number, row in enumerate(rows, start=2):
        if None in row or None in row.values():
            raise ValueError(f"{path}: line {number} does not have the columns of the header; mend or remove the line")
    return rows


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    """Add a line, and the header before the first; it is on disk when this returns.

    Raises:
      ValueError: If the columns are not those of the file.
    """
    read_rows(path)  # takes a torn line away
    is_new = not path.exists() or path.stat().st_size == 0
    if not is_new:
        with path.open(newline="", encoding="utf-8") as file:
            header = next(csv.reader(file))
        if header != list(row):
            raise ValueError(f"{path}: the columns are {header}, the new row has {list(row)}")
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(row))
        if is_new:
            writer.writeheader()
        writer.writerow(row)
        file.flush()
        os.fsync(file.fileno())


def is_finished(run: PlannedRun, rows: Sequence[Mapping[str, str]]) -> bool:
    """Whether a run of these very settings has its row and its results."""
    known = {(row["label"], row["seed"], row["settings"]) for row in rows}
    return (run.label, str(run.seed), run.settings) in known and run.results.is_file()


# ---------------------------------------------------------------------------------------------------------------------
# Running


def run_all(
    runs: Sequence[PlannedRun],
    on_end: Callable[[PlannedRun, Measured], None],
    *,
    engine: Engine,
    threads: int,
    environment: Mapping[str, str],
    parallel: int,
) -> None:
    """Run what is given, ``parallel`` at a time, in order.

    Args:
      runs: Runs to do.
      on_end: Called in this thread as each run ends well.
      engine: What carries the messages.
      threads: CPU threads per site.
      environment: Environment variables beyond this process's; nnU-Net's result folder is each run's own.
      parallel: Runs at a time.

    Raises:
      RunFailed: If a run failed. Those beside it end first and are handed to ``on_end``; no further one starts.
    """
    failed = threading.Event()
    failures: list[RunFailed] = []
    with ThreadPoolExecutor(parallel) as pool:
        waiting = {pool.submit(_unless, failed, run, engine, threads, environment): run for run in runs}
        try:
            for future in as_completed(waiting):
                try:
                    took = future.result()
                except RunFailed as failure:
                    failures.append(failure)
                else:
                    if took is not None:
                        on_end(waiting[future], took)
        except BaseException:  # an interrupt, or on_end
            failed.set()
            raise
    if failures:
        raise failures[0]


def _unless(
    failed: threading.Event, run: PlannedRun, engine: Engine, threads: int, environment: Mapping[str, str]
) -> Measured | None:
    """Do a run, or, if another has failed, leave it and return None; tell the others if this one fails."""
    if failed.is_set():
        return None
    try:
        return _run_one(run, engine, threads, environment)
    except BaseException:
        failed.set()
        raise


def _run_one(run: PlannedRun, engine: Engine, threads: int, environment: Mapping[str, str]) -> Measured:
    logger.info("%s, seed %d: started, %s", run.label, run.seed, run.log)
    run.workspace.mkdir(parents=True, exist_ok=True)
    extra = {"OMP_NUM_THREADS": str(threads), **environment}
    child = child_environment(SOURCES, extra, without=["nnUNet_results"])
    command = [sys.executable, "-m", "fedcmt.compare_runs", "--job", str(run.folder), "--workspace", str(run.workspace)]
    command += ["--engine", engine, "--seed", str(run.seed), "--threads", str(threads)]
    started = time.monotonic()
    with run.log.open("w") as log:
        # The pipe closes when this process ends, however it ends; the run then ends too.
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=child,
        )
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.stdin is not None:
        process.stdin.close()
    if process.returncode:
        raise RunFailed(f"{run.label}, seed {run.seed}: failed (exit code {process.returncode}); see {run.log}")
    return Measured(round(time.monotonic() - started, 1), round(usage.ru_maxrss * _MAXRSS_UNIT / _MEBIBYTE, 1))


def finished_row(
    run: PlannedRun, measured: Measured, results: Mapping[str, Any], scores: Mapping[str, float]
) -> dict[str, Any]:
    """A run's line in ``runs.csv``.

    Args:
      run: The run.
      measured: What it took.
      results: Its results.json.
      scores: Column name to value, e.g. ``dice client1``.
    """
    sites = results["sites"].values()
    return {
        "label": run.label,
        "job": run.job,
        "seed": run.seed,
        "settings": run.settings,
        "ended": f"{datetime.now():%Y-%m-%d %H:%M:%S}",
        "rounds": results["rounds"],
        "seconds": measured.seconds,
        "peak_memory_mib": measured.peak_memory_mib,
        "bytes_sent": sum(site["bytes_sent"] for site in sites),
        "bytes_received": sum(site["bytes_received"] for site in sites),
        **scores,
    }


# ---------------------------------------------------------------------------------------------------------------------
# The process of one run


def main(arguments: Sequence[str] | None = None) -> int:
    """Do one run; returns the exit code."""
    parser = argparse.ArgumentParser(prog="fedcmt.compare_runs", description="One run of a comparison.")
    parser.add_argument("--job", type=Path, required=True, help="staged job folder")
    parser.add_argument("--workspace", type=Path, required=True)
    parser.add_argument("--engine", choices=("inprocess", "simulator"), required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    options = parser.parse_args(arguments)
    threading.Thread(target=_end_with_parent, args=(options.engine,), daemon=True).start()
    overrides = [("server.seed", options.seed)]
    try:
        launch(Run(options.job, options.workspace, options.engine, overrides, None, threads=options.threads))
    except (RuntimeError, ValueError, OSError) as error:
        sys.stderr.write(f"\n{error}\n")
        return 1
    return 0


def _end_with_parent(engine: Engine) -> None:
    """Wait for the end of standard input, which the parent keeps open as long as it lives."""
    os.read(sys.stdin.fileno(), 1)  # not through sys.stdin, whose lock would be held as Python shuts down
    if engine == "inprocess":
        os._exit(1)  # at once, or the comparison that is started again would find the workspace in use
    _thread.interrupt_main()  # the simulator's launcher ends what it has started


if __name__ == "__main__":
    sys.exit(main())
