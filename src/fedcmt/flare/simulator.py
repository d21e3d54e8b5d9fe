"""FLARE's simulator as a child process: started, followed and, whatever happens, ended with all it started."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import FrameType

import psutil

from fedcmt.workspace import WORKSPACE_VARIABLE

_DEAD_SITE = re.compile(r"(?:Subprocess died for|Communication error with) client ([\w-]+)")
_GRACE_SECONDS = 8.0
_ALLOWED_CLASSES = ["nvflare.", "fedcmt."]


class SimulatorError(RuntimeError):
    """The simulator ended without having finished the job."""


def run_simulator(
    job_folder: Path,
    flare_folder: Path,
    sites: Sequence[str],
    *,
    environment: Mapping[str, str],
    log: Path,
    on_line: Callable[[str], None],
    all_sites_needed: bool = True,
) -> None:
    """Run a job folder in FLARE's simulator, one process per site, until it ends.

    Args:
      job_folder: The materialised job.
      flare_folder: FLARE's own folder; it wipes all of it but ``local/`` at each start.
      sites: Names of the job's sites.
      environment: Of the child processes; by the workspace in it, those are found and ended whose parent died first.
      log: Receives every line the processes write.
      on_line: Gets every line too, for the terminal.
      all_sites_needed: End the run when the process of a site dies, instead of waiting for its task to time out.

    Raises:
      SimulatorError: If the exit code is not 0, or the process of a site died.
    """
    check_folder(flare_folder)
    _allow_classes(flare_folder)
    # One thread per site: with fewer, the simulator restarts each site's process for each of its tasks.
    command = [
        sys.executable,
        "-u",
        "-m",
        "nvflare.private.fed.app.simulator.simulator",
        str(job_folder),
        "-w",
        str(flare_folder),
    ]
    command += ["-c", ",".join(sites), "-t", str(len(sites))]
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as file:
        process = subprocess.Popen(
            command,
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        try:
            with _ending_on_signals():
                assert process.stdout is not None
                for line in process.stdout:
                    file.write(line)
                    file.flush()
                    on_line(line.rstrip("\n"))
                    if all_sites_needed and (died := _DEAD_SITE.search(line)):
                        reason = "it was killed, ran out of memory or crashed"
                        raise SimulatorError(f"the process of site {died[1]!r} died ({reason}); the log is {log}")
                code = process.wait()
        finally:
            end_processes({*descendants(process.pid), *_of_workspace(environment.get(WORKSPACE_VARIABLE))})
            process.wait()
    if code != 0:
        raise SimulatorError(f"FLARE's simulator ended with exit code {code}; all it wrote is in {log}")


def check_folder(folder: Path) -> None:
    """Raise `SimulatorError` if FLARE's simulator cannot work in this folder: it splits its commands at blanks."""
    if any(c.isspace() for c in str(folder)):
        raise SimulatorError(
            f"{folder}: FLARE's simulator cannot use a folder with blanks in its path; give --workspace another"
        )


def end_leftovers(workspace: Path) -> None:
    """End what an earlier run in this workspace left when its launcher was killed; call it only as the owner."""
    end_processes(_of_workspace(str(workspace)))


def end_processes(processes: Iterable[psutil.Process]) -> None:
    """End processes: first politely, after some seconds for good.

    The simulator puts each site in a session of its own, so ending its process group would leave them running.
    """
    processes = list(processes)
    for process in processes:
        _tell(process.terminate)
    _, alive = psutil.wait_procs(processes, timeout=_GRACE_SECONDS)
    for process in alive:
        _tell(process.kill)
    psutil.wait_procs(alive, timeout=_GRACE_SECONDS)


def descendants(pid: int) -> list[psutil.Process]:
    """A process and all that descends from it; nothing if it is gone."""
    try:
        root = psutil.Process(pid)
        return [*root.children(recursive=True), root]
    except psutil.NoSuchProcess:
        return []


def _of_workspace(workspace: str | None) -> list[psutil.Process]:
    """Other processes that a launcher started for this workspace."""
    found: list[psutil.Process] = []
    if workspace is None:
        return found
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and process.environ().get(WORKSPACE_VARIABLE) == workspace:
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def _tell(action: Callable[[], None]) -> None:
    try:
        action()
    except psutil.NoSuchProcess:
        return


def _allow_classes(flare_folder: Path) -> None:
    """FLARE loads only listed classes unless code travels inside the job; ours is installed, so it is listed."""
    local = flare_folder / "local"
    local.mkdir(parents=True, exist_ok=True)
    (local / "resources.json").write_text(json.dumps({"format_version": 2, "class_allow_list": _ALLOWED_CLASSES}))


class _ending_on_signals:
    """Turn SIGTERM and SIGHUP into SystemExit, so that ``finally`` runs; the old handlers come back afterwards."""

    def __enter__(self) -> None:
        self._before = {s: signal.signal(s, self._exit) for s in (signal.SIGTERM, signal.SIGHUP)}

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @staticmethod
    def _exit(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)


def child_environment(package_root: Path, extra: Mapping[str, str]) -> dict[str, str]:
    """This process's environment with the package importable and single-threaded maths libraries by default."""
    paths = [str(package_root), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths)), **extra}
