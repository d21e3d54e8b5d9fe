"""FLARE's processes: started with an environment of ours and, whatever happens, ended with all they started."""

import os
import signal
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

import psutil

from fedcmt.workspace import WORKSPACE_VARIABLE

_GRACE_SECONDS = 8.0
_SWEEPS = 3
_ENDING = (signal.SIGTERM, signal.SIGHUP)


class EngineError(RuntimeError):
    """FLARE ended without having finished the job."""


class Ended(SystemExit):
    """A signal asked this process to end; the code is what a shell gives for that signal."""

    code: int


def check_folder(folder: Path) -> None:
    """Raise `EngineError` if FLARE's simulator and POC cannot work in this folder: they split commands at blanks."""
    if any(c.isspace() for c in str(folder)):
        raise EngineError(
            f"{folder}: FLARE's simulator and POC cannot use a folder with blanks in its path; give --workspace another"
        )


def end_workspace(workspace: str | None) -> None:
    """End every process that a launcher started for this workspace, also those whose parent died first.

    A POC's start scripts restart what has ended, so it looks again until nothing is left.
    """
    for _ in range(_SWEEPS):
        found = processes_of(workspace)
        if not found:
            return
        end_processes(found)


def end_processes(processes: Iterable[psutil.Process]) -> None:
    """End processes: first politely, after some seconds for good.

    The simulator puts each site in a session of its own, so ending its process group would leave them running.
    """
    processes = list(processes)
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.terminate()
    _, alive = psutil.wait_procs(processes, timeout=_GRACE_SECONDS)
    for process in alive:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(alive, timeout=_GRACE_SECONDS)


def descendants(pid: int) -> list[psutil.Process]:
    """A process and all that descends from it; nothing if it is gone."""
    try:
        root = psutil.Process(pid)
        return [*root.children(recursive=True), root]
    except psutil.NoSuchProcess:
        return []


def processes_of(workspace: str | None) -> list[psutil.Process]:
    """Other processes that a launcher started for this workspace, by the variable in their environment."""
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


class ending_on_signals:
    """Turn SIGTERM and SIGHUP into `Ended`, so that ``finally`` runs; the old handlers come back afterwards.

    Processes forked meanwhile inherit the handlers and end as they would have without: a pool that ends its workers
    must not wait for what ``finally`` does in a copy of this process.
    """

    def __enter__(self) -> None:
        self._owner = os.getpid()
        self._before = {s: signal.signal(s, self._exit) for s in _ENDING}

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _exit(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._owner:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        raise Ended(128 + number)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Ignore SIGINT, SIGTERM and SIGHUP meanwhile: for cleaning up, which a second Ctrl-C would leave half done."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, *_ENDING)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
