"""FLARE's simulator as a child process, started and followed."""

import json
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from fedcmt.flare.components import allowed_classes
from fedcmt.flare.processes import (
    EngineError,
    check_folder,
    descendants,
    end_processes,
    ending_on_signals,
    processes_of,
    undisturbed,
)
from fedcmt.workspace import WORKSPACE_VARIABLE

_DEAD_SITE = re.compile(r"(?:Subprocess died for|Communication error with) client ([\w-]+)")


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
      EngineError: If the exit code is not 0, or the process of a site died.
    """
    check_folder(flare_folder)
    _allow_classes(flare_folder)
    # One thread per site: with fewer, the simulator restarts each site's process for each of its tasks.
    command = [sys.executable, "-u", "-m", "fedcmt.flare.simulator_process", str(job_folder)]
    command += ["-w", str(flare_folder), "-c", ",".join(sites), "-t", str(len(sites))]
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
            with ending_on_signals():
                assert process.stdout is not None
                for line in process.stdout:
                    file.write(line)
                    file.flush()
                    on_line(line.rstrip("\n"))
                    if all_sites_needed and (died := _DEAD_SITE.search(line)):
                        reason = "it was killed, ran out of memory or crashed"
                        raise EngineError(f"the process of site {died[1]!r} died ({reason}); the log is {log}")
                code = process.wait()
        finally:
            with undisturbed():
                end_processes({*descendants(process.pid), *processes_of(environment.get(WORKSPACE_VARIABLE))})
                process.wait()
    if code != 0:
        raise EngineError(f"FLARE's simulator ended with exit code {code}; all it wrote is in {log}")


def _allow_classes(flare_folder: Path) -> None:
    """FLARE loads only listed classes unless code travels inside the job; ours is installed, so it is listed."""
    local = flare_folder / "local"
    local.mkdir(parents=True, exist_ok=True)
    (local / "resources.json").write_text(json.dumps({"format_version": 2, "class_allow_list": allowed_classes()}))
