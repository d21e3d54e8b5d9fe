"""Resident memory, open files and processes over the rounds of a long job.

``python benchmarks/long_run.py`` runs a real job, as ``start_fl.sh`` does, with two sites of generated images, a small
network and two steps a round, and looks at all its processes at the end of each round. For each process it prints what
became of it after the first rounds:

(a) the growth of resident memory, by least squares; below 0.1 MB a round;
(b) the growth of the number of open files, from the first quarter of the rounds to the last, by the fewest in each, as
    images are open for moments; none;

and how many processes are left once the job has ended; none. The exit code is 1 if a target is missed. MB are 10^6
bytes. ``--engine inprocess`` is one process for all; in FLARE's ``simulator`` the server has one and each site two,
FLARE's and the one that trains.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

import numpy as np
import psutil

from fedcmt.data.phantoms import make_cohort
from fedcmt.flare.processes import descendants, end_processes, processes_of
from fedcmt.job_folder import apply_overrides, find_job, stage

ROOT = Path(__file__).resolve().parents[1]
_DATASET = {"kind": "brain_mr", "num_train": 5, "num_test": 1, "shape_vox": [24, 28, 20], "channels": ["FLAIR", "T2"]}
COHORT = {
    "Dataset901_LongRunA": {**_DATASET, "style": "site_a", "seed": 1},
    "Dataset902_LongRunB": {**_DATASET, "style": "site_b", "seed": 2},
}
SETTINGS = {
    "server.planning.base_features": 4,
    "server.planning.max_features": 8,
    "server.planning.max_stages": 3,
    "server.planning.max_patch_size": [16, 16, 24],
    "server.planning.batch_size": 2,
    "sites.local_steps": 2,
    "sites.val_batches": 1,
    "sites.mirroring": False,
    "client1.dataset_id": 901,
    "client2.dataset_id": 902,
}
MOST_MB_A_ROUND = 0.1
_RUN = "fedcmt.compare_runs"
_SIMULATOR = "fedcmt.flare.simulator_process"
_WORKER = "nvflare.private.fed.app.simulator.simulator_worker"
_SITE_PROCESS = "fedcmt.site_process"
_POLL_SECONDS = 0.05
_LEAST_ROUNDS = 8
_MEGABYTE = 1e6


@dataclass(frozen=True)
class Sample:
    """A process at the end of a round.

    Attributes:
      rounds: Rounds that have ended.
      resident_mb: Resident memory in MB.
      open_files: Files, sockets and pipes that it has open.
    """

    rounds: int
    resident_mb: float
    open_files: int


@dataclass(frozen=True)
class Course:
    """A process over the rounds.

    Attributes:
      first: After the first rounds, which set things up.
      last: At the end of the last round.
      mb_a_round: Slope of resident memory.
      files_gained: Fewest open files in the last quarter of the rounds, less those in the first.
    """

    first: Sample
    last: Sample
    mb_a_round: float
    files_gained: int


def main() -> int:
    """Run, look, print; 1 if a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=("inprocess", "simulator"), default="inprocess")
    parser.add_argument("--job", default="brats_sdl", help="of jobs/, with sites client1 and client2 that segment MR")
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--first", type=int, default=20, help="rounds that are not looked at")
    parser.add_argument("--folder", type=Path, help="where the run is kept, a new one; default: nowhere")
    options = parser.parse_args()
    if options.rounds < options.first + _LEAST_ROUNDS:
        parser.error(f"--rounds {options.rounds}: expected at least {_LEAST_ROUNDS} more than --first {options.first}")
    if options.folder is not None and options.folder.exists():
        parser.error(f"--folder {options.folder}: exists; name a new one, or an earlier run would be looked at")
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.folder or Path(temporary)).absolute()
        samples, left = _run(folder, options)
    courses = {who: summarise(who, own, options.first) for who, own in samples.items()}
    print(f"{options.job}, engine {options.engine}, {options.rounds} rounds, after the first {options.first}\n")
    print(table(courses))
    problems = missed(courses, left)
    print(f"processes left at the end: {left}\ntargets: {'; '.join(problems) or 'all met'}")
    return 1 if problems else 0


def _run(folder: Path, options: argparse.Namespace) -> tuple[dict[str, list[Sample]], int]:
    """The samples of each process, and how many processes the job left."""
    raw, job, workspace = folder / "nnUNet_raw", folder / "job_source", folder / "workspace"
    make_cohort(raw, COHORT)
    stage(find_job(ROOT / "jobs", options.job), job)
    apply_overrides(job, {**SETTINGS, "server.num_rounds": options.rounds}.items())
    variables = {k: v for k, v in os.environ.items() if not k.startswith("nnUNet_")}
    variables |= {"PYTHONPATH": str(ROOT / "src"), "nnUNet_raw": str(raw), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", _RUN, "--job", str(job), "--workspace", str(workspace)]
    command += ["--engine", options.engine, "--seed", "0", "--threads", "1"]
    log = folder / "run.log"
    seen: set[psutil.Process] = set()
    # The job ends when its standard input closes.
    with (
        log.open("w") as file,
        subprocess.Popen(command, env=variables, stdin=subprocess.PIPE, stdout=file, stderr=file) as process,
    ):
        try:
            samples = _followed(process, workspace / "server" / "rounds.jsonl", seen)
            left = _left(seen, workspace)
        finally:
            end_processes({*_left(seen, workspace), *descendants(process.pid)})
    if process.returncode:
        raise RuntimeError(f"the job failed with code {process.returncode}: {log.read_text()[-2000:]}")
    return samples, len(left)


def _followed(
    process: subprocess.Popen[bytes], rounds_file: Path, seen: set[psutil.Process]
) -> dict[str, list[Sample]]:
    """A sample of each process each time that ``rounds_file`` has a line more, until the job ends.

    All processes are added to those ``seen``.
    """
    samples: dict[psutil.Process, list[Sample]] = {}
    roles: dict[psutil.Process, str] = {}
    rounds = 0
    while process.poll() is None:
        ended = rounds_file.read_bytes().count(b"\n") if rounds_file.exists() else 0
        if ended > rounds:
            rounds = ended
            for one in descendants(process.pid):
                seen.add(one)
                with suppress(psutil.NoSuchProcess):
                    roles[one] = role(one)
                    sample = Sample(rounds, one.memory_info().rss / _MEGABYTE, one.num_fds())
                    samples.setdefault(one, []).append(sample)
        time.sleep(_POLL_SECONDS)
    alike = Counter(roles.values())
    return {roles[one] + (f" {one.pid}" if alike[roles[one]] > 1 else ""): own for one, own in samples.items()}


def role(process: psutil.Process) -> str:
    """What a process does in a job, by the commands of it and of its parent."""
    words, parent = process.cmdline(), process.parent()
    above = [] if parent is None else parent.cmdline()
    if _SITE_PROCESS in words and _WORKER in above:
        return f"{_site(above)}, training"
    if _WORKER in words:
        return f"{_site(words)}, FLARE"
    if _SIMULATOR in words:
        if _SIMULATOR not in above:
            return "simulator"
        return "server" if process.children() else "simulator's manager"
    if _RUN in words:
        return "launcher" if process.children() else "server and sites"
    return process.name()


def _site(words: Sequence[str]) -> str:
    return f"site {words[words.index('--client') + 1]}"


def _left(seen: Iterable[psutil.Process], workspace: Path) -> list[psutil.Process]:
    """Those of the job's processes that are still there."""
    alive = set(processes_of(str(workspace)))
    for one in seen:
        with suppress(psutil.NoSuchProcess):
            if one.is_running() and one.status() != psutil.STATUS_ZOMBIE:
                alive.add(one)
    return list(alive)


def summarise(who: str, samples: Sequence[Sample], first: int) -> Course:
    """The course of a process, ``who`` in errors, after the ``first`` rounds.

    Raises:
      ValueError: If the process was not there in enough of these rounds to tell.
    """
    late = [sample for sample in samples if sample.rounds > first]
    if len(late) < _LEAST_ROUNDS:
        raise ValueError(
            f"{who}: was there at the end of {len(late)} rounds after round {first}, expected {_LEAST_ROUNDS} or more; "
            "give more --rounds, unless it came and went"
        )
    slope = np.polyfit([s.rounds for s in late], [s.resident_mb for s in late], 1)[0]
    quarter = len(late) // 4
    files = [s.open_files for s in late]
    return Course(late[0], late[-1], float(slope), min(files[-quarter:]) - min(files[:quarter]))


def table(courses: Mapping[str, Course]) -> str:
    """A Markdown table, a row for each process."""
    lines = [
        "| process | rounds | resident, MB | growth, MB a round | open files | growth |",
        "|:--|--:|--:|--:|--:|--:|",
    ]
    for who, course in sorted(courses.items()):
        a, b = course.first, course.last
        lines.append(
            f"| {who} | {a.rounds} to {b.rounds} | {a.resident_mb:.1f} to {b.resident_mb:.1f} | "
            f"{course.mb_a_round:+.4f} | {a.open_files} to {b.open_files} | {course.files_gained:+d} |"
        )
    return "\n".join(lines)


def missed(courses: Mapping[str, Course], left: int) -> list[str]:
    """The targets that are missed, in words."""
    problems = []
    for who, course in sorted(courses.items()):
        if course.mb_a_round >= MOST_MB_A_ROUND:
            problems.append(f"{who} grows by {course.mb_a_round:.3f} MB a round, below {MOST_MB_A_ROUND} is asked for")
        if course.files_gained > 0:
            problems.append(f"{who} has {course.files_gained} more files open")
    if left:
        problems.append(f"{left} processes are left")
    return problems


if __name__ == "__main__":
    sys.exit(main())
